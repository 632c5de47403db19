"""TRL's GRPO loss on given log-probabilities, driven line by line over stdin and stdout.

`build` (arrays from an .npz), `check` (loss and gradient of one setting), `time` (seconds of one
call). The loss is TRL's own `GRPOTrainer._compute_loss`, its metrics included, on an object that
holds its settings and hands out the given log-probabilities in the place of a model's. "plain" is the
same formula without metrics in plain PyTorch, which torch.compile takes. Advantages are inline in TRL's
trainer, so their formula is written out. Every line in is a JSON command, every line out its JSON
answer. Needs torch and trl.
"""

import collections
import time
import types

import numpy as np
import torch
import trl
from serve import serve
from trl.trainer.grpo_trainer import GRPOTrainer

DATA = {}
# Fields of GRPOConfig of each setting that is compared.
SETTINGS = {
    "GRPO": dict(loss_type="grpo", beta=0.04),
    "DAPO": dict(loss_type="dapo", epsilon_high=0.28),
    "GSPO": dict(loss_type="grpo", importance_sampling_level="sequence", epsilon=3e-4, epsilon_high=4e-4),
    "CISPO": dict(loss_type="cispo", epsilon_high=5.0),
    "SAPO": dict(loss_type="sapo"),
}  # fmt: skip


class Alone:
    """An accelerator of one process."""

    num_processes, sync_gradients = 1, True

    def gather(self, x):
        return x

    def reduce(self, x, reduction):
        return x


def trainer(setting):
    """What `_compute_loss` reads of a trainer."""
    fields = {"beta": 0.0, "epsilon": 0.2, "importance_sampling_level": "token"} | SETTINGS[setting]
    low, high = fields["epsilon"], fields.get("epsilon_high", fields["epsilon"])
    arguments = dict(delta=None, use_bias_correction_kl=False, sapo_temperature_pos=1.0)
    arguments |= dict(sapo_temperature_neg=1.05, steps_per_generation=1)
    logp = DATA["logp"]
    return types.SimpleNamespace(
        loss_type=fields["loss_type"], beta=fields["beta"], epsilon_low=low, epsilon_high=high,
        importance_sampling_level=fields["importance_sampling_level"],
        args=types.SimpleNamespace(**arguments), accelerator=Alone(),
        model=types.SimpleNamespace(training=True), current_gradient_accumulation_steps=1,
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        use_vllm=False, _entropy_bonus_enabled=False,
        _metrics={"train": collections.defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp, DATA["entropy"], None),
    )  # fmt: skip


def advantages():
    """Rewards less their group's mean, over its std (ddof 1) plus 1e-4; groups are neighbours."""
    rewards = DATA["rewards"].view(DATA["groups"], -1)
    std = rewards.std(1, keepdim=True)
    return ((rewards - rewards.mean(1, keepdim=True)) / (std + 1e-4)).view(-1)


def theirs(setting):
    """TRL's own loss."""
    batch = dict(
        prompt_ids=DATA["none"], prompt_mask=DATA["none"], completion_ids=DATA["ids"],
        completion_mask=DATA["mask"], advantages=advantages(),
        old_per_token_logps=DATA["logp_old"], ref_per_token_logps=DATA["logp_ref"],
        num_items_in_batch=DATA["mask"].sum(),
    )  # fmt: skip
    return GRPOTrainer._compute_loss(DATA["trainer"][setting], None, batch)


def plain(setting):
    """The same value without metrics."""
    s, mask, logp = DATA["trainer"][setting], DATA["mask"], DATA["logp"]
    adv = advantages()[:, None]
    change, lengths = logp - DATA["logp_old"], mask.sum(-1).clamp(min=1.0)
    if s.importance_sampling_level == "sequence":
        change = ((change * mask).sum(-1) / lengths)[:, None]
    ratio = change.exp()
    if s.loss_type == "cispo":
        loss = -ratio.clamp(max=s.epsilon_high).detach() * adv * logp
    elif s.loss_type == "sapo":
        heat = torch.where(adv > 0, s.args.sapo_temperature_pos, s.args.sapo_temperature_neg)
        loss = -adv * torch.sigmoid(heat * (ratio - 1)) * 4 / heat
    else:
        clipped = ratio.clamp(1 - s.epsilon_low, 1 + s.epsilon_high)
        loss = -torch.minimum(ratio * adv, clipped * adv)
    if s.beta:
        away = DATA["logp_ref"] - logp
        loss = loss + s.beta * (away.exp() - away - 1)
    if s.loss_type in ("grpo", "sapo"):
        return ((loss * mask).sum(-1) / lengths).mean()
    return (loss * mask).sum() / mask.sum()


def build(npz, groups):
    """Arrays as tensors, and a stub trainer of each setting."""
    DATA.update({name: torch.from_numpy(x) for name, x in np.load(npz).items()}, groups=groups)
    DATA["logp"].requires_grad_()
    rows, _ = DATA["logp"].shape
    DATA["entropy"] = torch.zeros_like(DATA["logp_old"])
    DATA["ids"] = torch.zeros(DATA["logp"].shape, dtype=torch.long)
    DATA["none"] = torch.zeros(rows, 0, dtype=torch.long)
    DATA["trainer"] = {name: trainer(name) for name in SETTINGS}
    DATA["sides"] = {"trl": theirs, "plain": plain, "compiled": torch.compile(plain)}
    return {"torch": torch.__version__, "trl": trl.__version__, "threads": torch.get_num_threads()}


def run(side, setting):
    """(loss, gradient)."""
    loss = DATA["sides"][side](setting)
    return loss, torch.autograd.grad(loss, DATA["logp"])[0]


def check(side, setting, npy):
    """The loss; the gradient goes into a file."""
    loss, gradient = run(side, setting)
    np.save(npy, gradient.numpy())
    return {"loss": loss.item()}


def time_(side, setting):
    """Seconds of one call."""
    begin = time.perf_counter()
    run(side, setting)
    return time.perf_counter() - begin


if __name__ == "__main__":
    serve({"build": build, "check": check, "time": time_})
