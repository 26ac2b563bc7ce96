"""Multi-head latent attention of one position a sequence over a paged cache of latents."""
