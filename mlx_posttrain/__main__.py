"""``python -m mlx_posttrain``."""

from mlx_posttrain.cli import main

if __name__ == "__main__":
    main()
