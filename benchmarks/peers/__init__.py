"""Other quantizers on the same model, the same tensors, the same bits and the same calibration tokens as klquant.

    python -m benchmarks.peers.llm_compressor MODEL --recipe int4 --calib TEXT -o OUT
    python -m benchmarks.peers.autoround      MODEL --recipe int4 --calib TEXT -o OUT
    python -m benchmarks.peers.gptqmodel      MODEL --recipe int4 --calib TEXT -o OUT
    klquant eval OUT --against MODEL --data TEXT -o OUT.json

Each needs its tool in the environment (`pip install llmcompressor==0.14.0.1`, which brings AutoRound along, or
`gptqmodel==7.7.0`; they pin other versions of transformers and compressed-tensors, so give each its own). MODEL is a
folder with a small checkpoint: it is held in memory whole. The tools' own code does the work, with their own defaults
but for what an option names; what each needed to take this architecture at all is in its file.
"""
