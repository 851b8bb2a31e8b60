"""How fast training is."""

import jax

from heal_jax.config import TrainSpec
from heal_jax.model.config import DecoderConfig
from heal_jax.model.lora import count
from heal_jax.plan import flops
from heal_jax.train.checkpoint import Progress

# bfloat16 FLOP/s of a device, by what its `device_kind` begins with: as the makers publish them, without sparsity.
PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak() -> float | None:
    """Of all devices of this job together; None where their kind is not known (CPUs)."""
    kind = jax.devices()[0].device_kind
    found = max((name for name in PEAKS if kind.startswith(name)), key=len, default=None)
    return None if found is None else PEAKS[found] * jax.device_count()


class Meter:
    """Speed since it was last asked. The first answer holds compiling."""

    def __init__(self, config: DecoderConfig, spec: TrainSpec, length: int, progress: Progress):
        self._flops = spec.batch * flops.training(config, length, "none", adapters=count(config, spec.lora))
        self._last = progress

    def since(self, progress: Progress) -> dict[str, float | None]:
        """tokens_per_second, without padding; mfu: model FLOPs utilisation (Chowdhery et al., arXiv
        2204.02311): FLOPs that the model needs, padding included and what is computed twice not, over what the devices
        could do in bfloat16."""
        steps, seconds = progress.step - self._last.step, progress.seconds - self._last.seconds
        tokens, self._last = progress.tokens - self._last.tokens, progress
        most = peak()
        return {
            "tokens_per_second": round(tokens / seconds, 1),
            "mfu": None if most is None else round(steps * self._flops / seconds / most, 4),
        }
