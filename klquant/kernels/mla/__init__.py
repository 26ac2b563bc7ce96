"""Multi-head latent attention over paged latents: of one position a sequence, and what surrounds that of a chunk."""
