"""Settings of the libraries below, made before they are imported."""

import logging
import os
import sys


def prepare_libraries(offline: bool, quantized: bool = True) -> None:
    """Keep the libraries quiet in a batch log and off the network.

    Parameters
    ----------
    offline
        Whether everything that is needed is on disk by now: a look at the hub would cost seconds,
        or fail on a compute node.
    quantized
        Whether the backbone may be one in 4 bits.
    """
    # It warns of an optional kernel for CPUs.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not quantized and "peft" not in sys.modules:
        # PEFT imports it where it is installed, needed or not: a second of CPU time, and 50 MB.
        sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    if offline:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    if not torch.cuda.is_available():
        # Otherwise DeepSpeed warns that it could not detect an accelerator.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    disable_progress_bars()
