"""Named resources of common machines: `-h h100x8` asks for a whole node.

Found by entry point (`torchx.named_resources`); TorchX's own, such as `aws_p5.48xlarge`, stay. The memory is what a
scheduler can give out, some less than a vendor states; a node of another make is asked for by --cpu, --gpu and --memMB.
"""

from torchx.specs import Resource

from mufasa_rec.launch.preflight import ACCELERATOR

MB_PER_GB = 1024


def h100x8() -> Resource:
    """Eight H100 of 80 GB, 96 physical cores or twice as many virtual ones."""
    return Resource(cpu=96, gpu=8, memMB=1800 * MB_PER_GB, capabilities={ACCELERATOR: "H100"})


def h200x8() -> Resource:
    """Eight H200 of 141 GB, 96 physical cores or twice as many virtual ones."""
    return Resource(cpu=96, gpu=8, memMB=1800 * MB_PER_GB, capabilities={ACCELERATOR: "H200"})


def a100x8() -> Resource:
    """Eight A100 of 40 or 80 GB, 96 virtual cores."""
    return Resource(cpu=90, gpu=8, memMB=1000 * MB_PER_GB, capabilities={ACCELERATOR: "A100"})


def cpu() -> Resource:
    """Two cores without a GPU: enough to try a job out."""
    return Resource(cpu=2, gpu=0, memMB=8 * MB_PER_GB)
