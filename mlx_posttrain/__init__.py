"""Post-training of language models, written once and run on MLX and on PyTorch CPU."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("mlx-posttrain")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"
