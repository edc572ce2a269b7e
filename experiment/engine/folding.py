"""BatchNorm folded into convolutions: a view of a network for its frozen eval-mode passes."""

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from attacks import frozen


class FrozenLayer(nn.Module):
    """A convolution or linear layer, followed by an eval-mode BatchNorm or not, with weights of its own.

    They are made of the layer's by `refresh`: folded with the BatchNorm's, and stored as `dtype`.
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear, bn: nn.BatchNorm2d | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        self._origin = (layer, bn)  # in a tuple: not submodules of this one
        self.padding = layer.padding if isinstance(layer, nn.Conv2d) else None
        layout = torch.channels_last if isinstance(layer, nn.Conv2d) else torch.contiguous_format
        weight = torch.empty_like(layer.weight, dtype=dtype, memory_format=layout, requires_grad=False)
        self.register_buffer("weight", weight)
        biased = bn is not None or layer.bias is not None
        self.register_buffer("bias", weight.new_empty(len(weight)) if biased else None)

    def forward(self, x: Tensor) -> Tensor:
        layer = self._origin[0]
        if self.padding is None:
            return F.linear(x, self.weight, self.bias)
        return F.conv2d(x, self.weight, self.bias, layer.stride, self.padding, layer.dilation, layer.groups)

    @property
    def sources(self) -> list[Tensor]:
        """The tensors that the layer's weights are made of."""
        layer, bn = self._origin
        found = [layer.weight, layer.bias]
        if bn is not None:
            found += [bn.weight, bn.bias, bn.running_mean, bn.running_var]
        return [tensor for tensor in found if tensor is not None]

    @torch.no_grad()
    def refresh(self) -> None:
        """Make the weights anew, in place: compiled code keeps their addresses."""
        layer, bn = self._origin
        if bn is None:
            self.weight.copy_(layer.weight)
            if self.bias is not None:
                self.bias.copy_(layer.bias)
            return
        scale = torch.rsqrt(bn.running_var + bn.eps)
        if bn.weight is not None:
            scale = scale * bn.weight
        shift = -bn.running_mean if layer.bias is None else layer.bias - bn.running_mean
        self.weight.copy_(layer.weight * scale[:, None, None, None])
        self.bias.copy_(shift * scale if bn.bias is None else shift * scale + bn.bias)


def folded_view(
    model: nn.Module, *, merge_pads: bool = False, dtype: torch.dtype | None = None
) -> fx.GraphModule | None:
    """A view of the model's eval-mode forward in which each BatchNorm that follows a convolution is folded into it.

    Modules that cannot be folded are shared with the model. Returns None, so that the model runs as it is, where a view
    would not be the model: its forward cannot be traced, such as one with branches on data; hooks run with it, such as
    weight_norm's, which makes the weight anew in each pass; it makes tensors that are no weights, such as random ones,
    which a trace takes for constants.

    Args:
        merge_pads: let a convolution do the padding before it, where that is of zeros and alike on opposite sides.
        dtype: store the weights of convolutions and linear layers so, for passes under autocast to this type.
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
            view.set_submodule(before.target, FrozenLayer(conv, bn, dtype))
            node.replace_all_uses_with(before)
            graph.erase_node(node)
    if dtype is not None:
        _store_the_other_layers(view, modules, dtype)
    if merge_pads:
        _merge_pads(view)
    graph.eliminate_dead_code()
    view.recompile()
    return view


def _store_the_other_layers(view: fx.GraphModule, modules: dict[str, nn.Module], dtype: torch.dtype) -> None:
    """Give the layers that no BatchNorm follows stored weights too: autocast then casts none of them in a pass."""
    for name in {node.target for node in view.graph.nodes if node.op == "call_module"}:
        layer = modules[name]
        plain = type(layer) is nn.Linear or (type(layer) is nn.Conv2d and layer.padding_mode == "zeros")
        if plain and view.get_submodule(name) is layer:
            view.set_submodule(name, FrozenLayer(layer, None, dtype))


def _merge_pads(view: fx.GraphModule) -> None:
    """Drop pads of zeros, alike on opposite sides, whose only reader is a folded convolution: it pads by as much more.

    RobustBench's WideResNets pad by hand before the first convolution of a block: a copy of the activations in each
    pass, and of their gradient.
    """
    for node in list(view.graph.nodes):
        if node.op != "call_function" or node.target is not F.pad or len(node.users) != 1:
            continue
        (reader,) = node.users
        layer = view.get_submodule(reader.target) if reader.op == "call_module" else None
        if not isinstance(layer, FrozenLayer) or not isinstance(layer.padding, tuple):
            continue
        pad = dict(zip(("input", "pad", "mode", "value"), node.args, strict=False)) | node.kwargs
        if pad.get("mode", "constant") != "constant" or pad.get("value") or len(pad["pad"]) != 4:
            continue
        left, right, top, bottom = pad["pad"]
        calls = [other for other in view.graph.nodes if other.target == reader.target]
        if left == right >= 0 and top == bottom >= 0 and len(calls) == 1:
            layer.padding = (layer.padding[0] + top, layer.padding[1] + left)
            node.replace_all_uses_with(pad["input"])
            view.graph.erase_node(node)
