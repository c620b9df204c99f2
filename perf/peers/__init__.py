"""The networks that the papers compare MST-GAN with, written from their papers, and MST-GAN's own.

Names of weights are those of the published checkpoints. Every network takes (N, T, 3, H, W) float frames,
0..1 RGB, and gives (N, T', 3, 4H, 4W): all frames of the clip where it is recurrent, the center frame where
it looks through a window. Of Improved EDVR (WACV Workshops 2022) neither code nor text is public.
"""

from __future__ import annotations

from functools import partial

from export.network import BASELINE, COMPACT, PRUNED, STUDENT, MstGan
from perf.network import Network
from perf.peers.basicvsr import BasicVsr
from perf.peers.edvr import WINDOW as EDVR_WINDOW
from perf.peers.edvr import Edvr
from perf.peers.rsdn import Rsdn

PLANNED = "MST-GAN, pruned"  # what `make plans` compiles
CLIP = 3  # frames of a recurrent network's clip; longer ones take longer and say the same per frame
WINDOW = 3  # of ours
WIDTHS = {
    "MST-GAN": BASELINE, "MST-GAN, pruned": PRUNED, "MST-GAN, compact": COMPACT, "MST-GAN, student": STUDENT,
}  # fmt: skip
OURS = {name: Network(partial(MstGan, widths), WINDOW, takes_bytes=True) for name, widths in WIDTHS.items()}
NETWORKS = {
    **OURS,
    "BasicVSR": Network(BasicVsr, CLIP, CLIP),
    "RSDN": Network(Rsdn, CLIP, CLIP),
    "EDVR-M": Network(partial(Edvr, 64, 10), EDVR_WINDOW),  # the moderate one of the paper's section 4.1
    "EDVR-L": Network(partial(Edvr, 128, 40), EDVR_WINDOW),
}
