"""LoRA layers that cost what their matrix products cost.

Enters: a PEFT LoRA configuration. Leaves: the same adapter, with one fused layer instead of five operations.
Refuses: nothing: whatever is more than plain LoRA on a linear layer is left to PEFT.

PEFT adds the adapter's output to the layer's as `result + B(A(x)) * scale`: two passes over large tensors forward, more
backward. Here the small product is added inside the matrix multiplication (as in Unsloth's kernels, in plain torch).
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear


class _LoraLinear(torch.autograd.Function):
    """x Wᵀ + b + scale · (x Aᵀ) Bᵀ for a frozen W and b.

    Shapes: x (rows, in), W (out, in), b (out), A (rank, in), B (out, rank).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        ctx.inputs_dtype, ctx.scale = x.dtype, scale
        with torch.autocast(device, enabled=False):
            x, weight, a, b = (value.to(dtype) for value in (x, weight, a, b))
            low = x @ a.T
            out = torch.nn.functional.linear(x, weight, None if bias is None else bias.to(dtype))
            out.addmm_(low, b.T, alpha=scale)
        ctx.save_for_backward(x, weight, a, b, low)
        return out

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> tuple[Any, ...]:
        x, weight, a, b, low = ctx.saved_tensors
        slope = slopes[0].to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            up = slope @ b
            grad_a, grad_b = up.T @ x, slope.T @ low
            grad_x = None
            if ctx.needs_input_grad[0]:
                grad_x = (slope @ weight).addmm_(up, a, alpha=ctx.scale).to(ctx.inputs_dtype)
        return grad_x, None, None, (grad_a * ctx.scale).float(), (grad_b * ctx.scale).float(), None


class FusedLinear(Linear):  # type: ignore[misc]
    """PEFT's LoRA layer; one plain adapter that is trained goes the fused way, everything else PEFT's own."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        name = self.active_adapters[0] if len(self.active_adapters) == 1 else None
        if (
            name not in self.lora_A
            or self.disable_adapters
            or self.merged
            or args
            or kwargs
            or self.lora_variant
            or self.lora_bias[name]
            or self.base_layer.weight.requires_grad
            or self.lora_A[name].weight.dtype != torch.float32
            or not isinstance(self.lora_dropout[name], torch.nn.Identity)
        ):
            plain: torch.Tensor = super().forward(x, *args, **kwargs)
            return plain
        out: torch.Tensor = _LoraLinear.apply(  # type: ignore[no-untyped-call]
            x.flatten(0, -2),
            self.base_layer.weight,
            self.base_layer.bias,
            self.lora_A[name].weight,
            self.lora_B[name].weight,
            self.scaling[name],
        )
        return out.view(*x.shape[:-1], out.shape[-1])
