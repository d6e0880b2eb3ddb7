"""Floor 2: small changes to single layers; one file each."""
