"""The engine: packed weights on their devices, and what runs them.

    weights, build, load, synthetic   what is held of a model, from a checkpoint or from noise
    sizes, placement, usage           bytes and devices, before anything is loaded, and after
    state                             KDA slots and latent pages on a device
    decode, sampler                   one token for each of B sequences, as tensor operations
    prefill                           chunks of prompts, as tensor operations
    graphs, runner                    the model's steps: chunks of prompts, and decode steps as CUDA graphs
    scheduler                         who runs next, in plain numbers
    request, job, reply, text         what is asked for, and how tokens become an answer
    limits, loop, engine, session     all requests together; conversations that keep their state
    warm                              kernels built and graphs captured before anyone waits
    bench, ceilings                   how fast it is, and how fast it could be

Start with `klquant.engine.engine.Engine.from_pretrained`.
"""
