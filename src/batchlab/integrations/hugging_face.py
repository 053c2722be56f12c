"""A Hugging Face `Trainer` whose batch size moves, and the noise scale inside any `Trainer` as a callback."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from batchlab.core.errors import BatchlabError, InputError
from batchlab.core.facts import Estimate
from batchlab.integrations.micro_batches import examples_in
from batchlab.measure import GradientNoise
from batchlab.measure.norms import sq_norm

try:
    from transformers import TrainerCallback

    from batchlab.integrations.hugging_face_batch import AdaptiveBatchTrainer as AdaptiveBatchTrainer
except ImportError as error:
    raise BatchlabError("the Hugging Face integration needs transformers: pip install 'batchlab[hf]'") from error


class GradientNoiseCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Measures the gradient noise scale of a `Trainer`'s run and logs it as "noise_scale", in examples.

        trainer = Trainer(model, args, train_dataset=data, callbacks=[GradientNoiseCallback()])

    Needs two micro-batches an update: `gradient_accumulation_steps` of 2 or more, or several processes. The Trainer
    clips before its callbacks see the gradient; in one process the norm is taken before that, with several processes
    `max_grad_norm=0` is needed. Not for fp16 with a loss scale, DeepSpeed or FSDP. Where the Trainer weighs
    micro-batches by their tokens, equal numbers of tokens are assumed.

    options: of `batchlab.measure.GradientNoise`. `estimate` is the latest one, None before the first.
    """

    def __init__(self, **options: Any) -> None:
        self.estimate: Estimate | None = None
        self._options = options
        self._noise: GradientNoise | None = None
        self._piece: Any = None
        self._hooks: list[Any] = []
        self._squares: dict[nn.Parameter, Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        """Attaches to the model."""
        if model is None:
            raise InputError("the Trainer gave its callback no model")
        if args.fp16:
            raise InputError("GradientNoiseCallback cannot see through fp16's loss scale: use bf16=True")
        if dist.is_initialized() and dist.get_world_size() > 1 and args.max_grad_norm:
            raise InputError("GradientNoiseCallback with several processes needs max_grad_norm=0: clipping comes first")
        self._noise = GradientNoise(model, **self._options)
        trained = [p for p in model.parameters() if p.requires_grad]
        self._hooks = [p.register_post_accumulate_grad_hook(self._accumulated) for p in trained]  # type: ignore[no-untyped-call]
        self._hooks.append(model.register_forward_pre_hook(self._forward, with_kwargs=True))

    def _forward(self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        if module.training and torch.is_grad_enabled() and self._piece is None and self._noise is not None:
            self._piece = self._noise.micro_batch(examples_in([*arguments, named]))
            self._piece.__enter__()

    def _accumulated(self, parameter: nn.Parameter) -> None:
        if parameter.grad is not None and self._piece is not None:
            self._squares[parameter] = sq_norm(parameter.grad)

    def _end_piece(self) -> None:
        if self._piece is not None:
            self._piece.__exit__(None, None, None)
            self._piece = None

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After each micro-batch but an update's last."""
        self._end_piece()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After an update's last micro-batch and clipping."""
        self._end_piece()
        if self._noise is None:
            return
        alone = not dist.is_initialized() or dist.get_world_size() == 1
        before_clipping = torch.stack([*self._squares.values()]).double().sum() if alone else None
        self.estimate = self._noise.step(grad_sq_norm=before_clipping)
        self._squares = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Adds the noise scale to the training logs."""
        if logs is not None and "loss" in logs and self.estimate is not None and self.estimate.defined:
            logs["noise_scale"] = self.estimate.value
            if state.log_history:
                state.log_history[-1]["noise_scale"] = self.estimate.value

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Takes everything off the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._noise is not None:
            self._noise.close()
