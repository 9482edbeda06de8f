"""TorchX components: functions that return an `AppDef`, one self-contained file each, run by path with `torchx run`."""
