"""U-Net on the grey levels of handwritten digits, uniform diffusion told the digit; a laptop CPU.

Launch:   jaxlab train unet
          jaxlab sample runs/unet --n 10 --views 3 --psi guidance=2
Expected: being measured
"""

from models.unet import UNetConfig
from train.data.pixels import Pixels
from train.denoise import Psi
from train.diffusion import Diffusion
from train.evaluate import HeldOut
from train.frechet import Frechet
from train.optimizer import Optimizer
from train.run import Run


def run() -> Run:
    """The cosine schedule and the sampler are those of the papers for images."""
    psi = Psi(middle="constant-0.95", high_frac=0.5, middle_frac=0.4)
    return Run(
        model=UNetConfig(),
        objective=Diffusion("uniform", schedule="cosine", classes=10),
        source=Pixels(),
        evaluators=(HeldOut(batches=0), Frechet(psi)),
        optimizer=Optimizer(lr=2e-3, weight_decay=0.0, ema=0.995, warmup=50),
        steps=1000,
        batch=64,
        log_every=50,
        eval_every=500,
        save_every=500,
    )
