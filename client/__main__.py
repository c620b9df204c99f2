"""``python -m mst_gan_client IN OUT``: the command ``mst-gan-upscale``."""

from .upscale import main

main()
