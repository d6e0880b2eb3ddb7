"""VAEs through their name tables."""

from __future__ import annotations

import pytest
import tiny
import torch

from sfumato.errors import UserError
from sfumato.families.autoencoders import load_kl, vae_keys


def test_a_vae_in_ldm_names_says_what_diffusers_does() -> None:
    theirs = tiny.parts(v2=False).vae
    ldm = vae_keys(theirs.state_dict()).to_foreign(theirs.state_dict())
    assert ldm["encoder.mid.attn_1.q.weight"].ndim == 4
    ours = load_kl(ldm)
    x, z = torch.rand(1, 3, 32, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1, torch.ones(1, 4, 4, 2)
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(x).latent_dist.mode(), theirs.encode(x).latent_dist.mode(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.decode(z).sample, theirs.decode(z).sample, atol=1e-5, rtol=1e-5)
    back = vae_keys(ldm).to_native(ldm)
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(back[name], t) for name, t in theirs.state_dict().items())


def test_early_diffusers_names() -> None:
    tensors = tiny.parts(v2=False).vae.state_dict()
    early = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, t in tensors.items():
        for new, old in early.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        renamed[name] = t
    assert renamed.keys() != tensors.keys()
    ours = load_kl(renamed).state_dict()
    assert all(torch.equal(ours[name], t) for name, t in tensors.items())


def test_what_is_no_vae_is_refused() -> None:
    with pytest.raises(UserError, match="no KL autoencoder"):
        load_kl({"a": torch.zeros(1)})
    tensors = dict(tiny.parts(v2=False).vae.state_dict())
    del tensors["decoder.conv_in.weight"]
    with pytest.raises(UserError, match=r"decoder\.conv_in\.weight"):
        load_kl(tensors)
