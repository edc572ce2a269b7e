"""BatchNorm folded into convolutions: a view of a network for its frozen eval-mode passes."""

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from attacks import frozen


class FoldedConv(nn.Module):
    """A convolution with the eval-mode BatchNorm after it: its weights are made of the two layers' by `refresh`."""

    def __init__(self, conv: nn.Conv2d, bn: nn.BatchNorm2d) -> None:
        super().__init__()
        self._origin = (conv, bn)  # in a tuple: not submodules of this one
        weight = torch.empty_like(conv.weight, memory_format=torch.channels_last, requires_grad=False)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", weight.new_empty(len(weight)))

    def forward(self, x: Tensor) -> Tensor:
        conv = self._origin[0]
        return F.conv2d(x, self.weight, self.bias, conv.stride, conv.padding, conv.dilation, conv.groups)

    @property
    def sources(self) -> list[Tensor]:
        """The tensors that the folded weights are made of."""
        conv, bn = self._origin
        found = [conv.weight, conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var]
        return [tensor for tensor in found if tensor is not None]

    @torch.no_grad()
    def refresh(self) -> None:
        """Make the weights anew, in place: compiled code and CUDA graphs keep their addresses."""
        conv, bn = self._origin
        scale = torch.rsqrt(bn.running_var + bn.eps)
        if bn.weight is not None:
            scale = scale * bn.weight
        shift = -bn.running_mean if conv.bias is None else conv.bias - bn.running_mean
        self.weight.copy_(conv.weight * scale[:, None, None, None])
        self.bias.copy_(shift * scale if bn.bias is None else shift * scale + bn.bias)


def folded_view(model: nn.Module) -> fx.GraphModule | None:
    """A view of the model's eval-mode forward in which each BatchNorm that follows a convolution is folded into it.

    Modules that cannot be folded are shared with the model. Returns None, so that the model runs as it is, where a view
    would not be the model: its forward cannot be traced, such as one with branches on data; hooks run with it, such as
    weight_norm's, which makes the weight anew in each pass; it makes tensors that are no weights, such as random ones,
    which a trace takes for constants.
    """
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return None
    with frozen(model):
        try:
            # The forward's constants, such as dropout's training flag, are those of eval mode: traced frozen.
            graph = fx.Tracer().trace(model)
        except Exception:  # a tracer fails in as many ways as a forward can be written
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
