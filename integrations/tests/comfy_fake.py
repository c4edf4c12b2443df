"""What the node needs of ComfyUI, rebuilt: the patcher, one attention call, two models, a sampler.

Signatures, keys and the order of calls are those of `comfy/model_patcher.py`, `samplers.py`,
`patcher_extension.py`, `ldm/modules/attention.py` and the two `model.py` at
cf3103c5 and 0c9a69ae of Comfy-Org/ComfyUI, whose package is on no index.
"""

import copy
import types

import torch
import torch.nn.functional as F


class CallbacksMP:
    ON_PRE_RUN, ON_PREPARE_STATE, ON_CLEANUP = "on_pre_run", "on_prepare_state", "on_cleanup"


class WrappersMP:
    DIFFUSION_MODEL = "diffusion_model"


class WrapperExecutor:
    def __init__(self, original, class_obj, wrappers):
        self.original, self.class_obj, self.wrappers = original, class_obj, wrappers

    def __call__(self, *args, **kwargs):
        return WrapperExecutor(self.original, self.class_obj, self.wrappers[1:]).execute(
            *args, **kwargs
        )

    def execute(self, *args, **kwargs):
        if not self.wrappers:
            return self.original(*args, **kwargs)
        return self.wrappers[0](self, *args, **kwargs)


def modules():
    """Return the modules that a pack imports of ComfyUI, the V3 node interface left out."""
    extension = types.SimpleNamespace(CallbacksMP=CallbacksMP, WrappersMP=WrappersMP)
    return {"comfy": types.ModuleType("comfy"), "comfy.patcher_extension": extension}


class ModelPatcher:
    def __init__(self, model, shift=8.0):
        self.model, self.callbacks, self.wrappers = model, {}, {}
        self.model_options = {"transformer_options": {}}
        warp = lambda t: shift * t / (1 + (shift - 1) * t)  # noqa: E731
        self.sampling = types.SimpleNamespace(percent_to_sigma=lambda p: warp(1.0 - p))

    def clone(self):
        new = copy.copy(self)
        new.model_options = {"transformer_options": dict(self.model_options["transformer_options"])}
        new.callbacks = {
            t: {k: [*c] for k, c in keyed.items()} for t, keyed in self.callbacks.items()
        }
        new.wrappers = {kind: [*wrappers] for kind, wrappers in self.wrappers.items()}
        return new

    def get_model_object(self, name):
        return {"model_sampling": self.sampling, "diffusion_model": self.model}[name]

    def add_callback_with_key(self, call_type, key, callback):
        self.callbacks.setdefault(call_type, {}).setdefault(key, []).append(callback)

    def add_wrapper_with_key(self, wrapper_type, key, wrapper):
        self.wrappers.setdefault(wrapper_type, []).append(wrapper)

    def call(self, call_type, *args):
        for callbacks in self.callbacks.get(call_type, {}).values():
            for callback in callbacks:
                callback(self, *args)


def optimized_attention(q, k, v, heads, mask=None, skip_reshape=False, **kwargs):
    """Call the override of the options, as `wrap_attn` does, else torch."""
    override = kwargs.get("transformer_options", {}).get("optimized_attention_override")
    if override and "_inside_attn_wrapper" not in kwargs:
        kwargs |= {"_inside_attn_wrapper": True, "mask": mask, "skip_reshape": skip_reshape}
        return override(optimized_attention, q, k, v, heads, **kwargs)
    if not skip_reshape:
        q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out if kwargs.get("skip_output_reshape") else out.transpose(1, 2).flatten(2)


def sample(patcher, latents, num_steps, branches=("cond", "uncond"), keep=lambda *_: None):
    """Run the model as KSampler does: a forward pass for each step and branch."""
    shares = torch.linspace(1, 0, num_steps + 1)
    sigmas = torch.tensor([patcher.sampling.percent_to_sigma(1 - float(s)) for s in shares])
    shared = patcher.model_options["transformer_options"] | {"sample_sigmas": sigmas}
    options, wrappers = {"transformer_options": shared}, patcher.wrappers.get("diffusion_model", [])
    patcher.call(CallbacksMP.ON_PRE_RUN)
    for step, sigma in enumerate(sigmas[:-1]):
        patcher.call(CallbacksMP.ON_PREPARE_STATE, sigma[None], options)
        for branch in branches:
            own = options["transformer_options"] | {"uuids": [branch], "sigmas": sigma[None]}
            run = WrapperExecutor(patcher.model.forward, patcher.model, wrappers)
            keep(step, branch, run.execute(latents, sigma, None, None, None, own))
    patcher.call(CallbacksMP.ON_CLEANUP)
