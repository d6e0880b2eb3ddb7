"""Weight files of full size that take no room, for all tests."""

from sfumato.formats.sparse import sparse

__all__ = ["sparse"]
