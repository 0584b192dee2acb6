"""Data sets: files or hub -> rows -> prompts and answers -> clients -> memory-mapped tokens.

``files`` and ``sources`` read ``rows`` and know where each stands, ``templates`` turns a row into a
prompt and an answer, ``loading`` makes a :class:`~fedamole.datasets.loading.Corpus` of them,
``splits`` spreads it over the clients, ``tokenize`` makes token ids and ``tokens`` stores them;
``overview`` has what a person wants to see of it. Nothing here imports torch.
"""
