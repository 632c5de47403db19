"""ViTTT classifier of images of one's own, with dropout and its uncertainty; a laptop CPU for small ones.

Launch:   jaxlab train images source.files=DIR source.classes=N model.classes=N
          DIR has a folder of images for each class, or is Parquet or ArrayRecord of labelled images;
          source.image=S model.image=S for other sides than 32, source.channels=1 model.channels=1 for grey
Expected: the held-out accuracy of your data; `jaxlab eval runs/images` prints where the model does not
          know and draws it into runs/images/uncertainty
"""

from models.vittt import ViTTTConfig
from train.classified import Uncertainty
from train.data.labelled import Images
from train.evaluate import HeldOut
from train.objectives import Classify
from train.optimizer import Optimizer
from train.posterior import Dropout
from train.run import Run


def run() -> Run:
    """Ten classes of colour images in ./images, as those of CIFAR-10."""
    return Run(
        model=ViTTTConfig(image=32, channels=3, dropout=0.1),
        objective=Classify(),
        source=Images(files=("images",)),
        evaluators=(HeldOut(batches=0), Uncertainty(Dropout())),
        optimizer=Optimizer(name="muon", lr=0.02, warmup=20),
        steps=1000,
        batch=64,
        eval_every=250,
    )
