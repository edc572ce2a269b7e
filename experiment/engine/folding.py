"""A view of a network with BatchNorm folded into convolutions, for frozen eval-mode passes."""

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from attacks import frozen


class FoldedConv(nn.Module):
    """A convolution with the eval-mode BatchNorm that follows it; `refresh` computes its weights from both layers."""

    def __init__(self, conv: nn.Conv2d, bn: nn.BatchNorm2d) -> None:
        super().__init__()
        self._origin = (conv, bn)  # in a tuple, so that they are not submodules
        weight = torch.empty_like(conv.weight, memory_format=torch.channels_last, requires_grad=False)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", weight.new_empty(len(weight)))

    def forward(self, x: Tensor) -> Tensor:
        conv = self._origin[0]
        return F.conv2d(x, self.weight, self.bias, conv.stride, conv.padding, conv.dilation, conv.groups)

    @property
    def sources(self) -> list[Tensor]:
        """The tensors from which the folded weights are computed."""
        conv, bn = self._origin
        found = [conv.weight, conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var]
        return [tensor for tensor in found if tensor is not None]

    @torch.no_grad()
    def refresh(self) -> None:
        """Recompute the weights in place: compiled code and CUDA graphs keep their addresses."""
        conv, bn = self._origin
        scale = torch.rsqrt(bn.running_var + bn.eps)
        if bn.weight is not None:
            scale = scale * bn.weight
        shift = -bn.running_mean if conv.bias is None else conv.bias - bn.running_mean
        self.weight.copy_(conv.weight * scale[:, None, None, None])
        self.bias.copy_(shift * scale if bn.bias is None else shift * scale + bn.bias)


def folded_view(model: nn.Module) -> fx.GraphModule | None:
    """Trace the model's eval-mode forward and fold each BatchNorm that follows a convolution into it.

    Modules that cannot be folded are shared with the model. Returns None, and the model then runs as it is, if a trace
    would be wrong: the forward cannot be traced (branches on data), has hooks (weight_norm recomputes the weight in
    each pass), or creates tensors, such as random ones, that a trace would treat as constants.
    """
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return None
    with frozen(model):
        try:
            # Traced in eval mode, which fixes constants such as dropout's training flag.
            graph = fx.Tracer().trace(model)
        except Exception:  # the exception depends on the traced code
            return None
    weights = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    if any(node.op == "get_attr" and node.target not in weights for node in graph.nodes):
        return None
    modules = dict(model.named_modules())
    view = fx.GraphModule(model, graph)
    for node in list(graph.nodes):
        bn = modules.get(node.target) if node.op == "call_module" else None
        before = node.args[0] if node.args else None
        if not isinstance(bn, nn.BatchNorm2d) or bn.running_var is None or not isinstance(before, fx.Node):
            continue
        conv = modules.get(before.target) if before.op == "call_module" else None
        if type(conv) is nn.Conv2d and conv.padding_mode == "zeros" and len(before.users) == 1:
            view.set_submodule(before.target, FoldedConv(conv, bn))
            node.replace_all_uses_with(before)
            graph.erase_node(node)
    graph.eliminate_dead_code()
    view.recompile()
    return view
