"""The device of one process, claimed before torch is imported."""

import os


def claim_device() -> str:
    """Make the card that the launcher gave this process the only one it sees, and return its name in torch.

    Libraries then agree on "cuda:0" whatever the list of cards (`--gpus 0,2`) or sharing (`--gpus 0,0`): accelerate
    would otherwise derive a card from the process's rank. Without a launcher (plain torchrun) the rank is the card.
    """
    device = os.environ.get("OPENSLOTH_DEVICE")
    if device is None:
        local_rank = os.environ.get("LOCAL_RANK", "0")
        device = f"cuda:{local_rank}" if has_cards() else "cpu"
    if not device.startswith("cuda"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a CPU run leaves the machine's cards alone
        return device
    index = int(device.partition(":")[2] or 0)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[index] if visible else str(index)
    if "LOCAL_RANK" in os.environ:
        os.environ["LOCAL_RANK"] = "0"  # the number of this process's card among those that it sees
    os.environ["OPENSLOTH_DEVICE"] = "cuda:0"  # asked once more, this process has claimed it
    return "cuda:0"


def has_cards() -> bool:
    import torch

    return torch.cuda.is_available()
