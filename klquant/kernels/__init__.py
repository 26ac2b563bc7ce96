"""What a decode step and a chunk of a prompt do on a GPU, each kernel beside a plain torch reference.

    bricks.py     Triton: packed words → exact codes → tiles of outputs; what linear and moe are made of; ptx.py has
                  the assembly of that
    card.py       what a card can do that tiles and launches depend on
    linear/       layout (how a weight lies in memory), tiles (which tile a shape gets), triton, reference,
                  dispatch (QuantLinear, QuantMLP: what the model holds instead of tensors)
    moe/          router, grouping (routes sorted by expert), triton, tiles, reference, dispatch (QuantExperts);
                  offload and exchange: experts that lie in the host's memory, and change places with others
    kda/          a position of Kimi Delta Attention between its projections, the states updated in place by slot; what
                  the delta rule reads of a chunk; tiles for flash-linear-attention's kernels of that rule
    step/         where the tokens of a step go, and their embeddings
    sample/       the noise that makes the largest logit a draw; what top-k, top-p and min-p leave to be drawn
    mla/          pages of latents in 16 or 8 bits, writing to them, absorbed attention to them; around that of a chunk
    norm/         h + delta and its RMSNorm; KDA's gated norm; those that the model uses

**Bytes.** At batch 1 a step of the 48B is reading 2.5 GB of weights once; arithmetic does not matter until some hundred
tokens share a weight. So the layout is made for reading: a weight is repacked once at load into 1 KiB bricks of 16 rows
(`linear.layout`) which one warp fetches with 16-byte asynchronous copies; each byte is fetched once, codes stay packed
until they are in registers, a scale is read once for 128 inputs.

**Instructions.** On a card with 4 TB/s four-bit codes arrive faster than an FP32 GEMV can convert and multiply them, so
all products, batch 1 included, run on tensor cores with the weight as the left operand and the tokens padded to 8.
Which inputs a word holds is chosen so that `(word >> 4i) & 0x000F000F | magic` is two neighbours of that operand: one
shift, one `lop3`, one `fma` for two codes, no shuffles and no transposes, the same for `mma` and for Hopper's `wgmma`.

**Precision.** Codes are exact integers in BF16 and FP16 and the scale multiplies FP32 sums of its group. The result is
closer to FP64 than the product with dequantized BF16 weights. No float atomics: a result has the same bits every time.

**Launches.** A linear map is one, an MLP two (gate, up and SiLU in the first), a layer of experts for few tokens one,
shared expert included, plus one that sorts routes from five tokens on, and for many tokens three (group, gate·up, down)
plus two for the shared expert; what adds a token's rows up is the next norm in a step, else a launch more. Between its
projections a KDA layer is two launches (what the states meet, the states), an MLA layer four (write the latent; absorb,
attend, finish), a norm with the sum before it and the router behind it one or two; a step begins with two and ends with
three.
Nothing asks the host, nothing is tuned at first use: all of it can be captured in a CUDA graph, with grids that depend
on the number of tokens only; a step's lengths and slots are read by the kernels. Tiles come from a table and fit the 99
KiB of shared memory of sm86 and sm89; attention alone takes a larger one, and as many parts as there are
multiprocessors, where the card has them.

In a chunk of a prompt the delta rule is flash-linear-attention's, with one launch before it (convolutions, norms, β)
and one behind it (the gated norm); attention is torch's, with two before it (latents out of their pages, keys and
values) and one behind each block of past latents. `klquant.model` takes the same kernels for whole windows, several at
once, where it calibrates or evaluates on a card in 16 bits.

16-bit weights go through the same kernels (a word is a BF16 value), for checkpoints that keep some matrices or all.
Importing this package imports neither Triton nor a kernel.
"""
