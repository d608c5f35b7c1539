"""Few-step sampling of a flow map: one network evaluation from each sigma to the next.

Made by Bowstring. Needs torch and diffusers, nothing else.
"""

from itertools import pairwise
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    FlowMapEulerDiscreteScheduler,
    ImagePipelineOutput,
    ModelMixin,
)
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image


class FlowMapPipeline(DiffusionPipeline):
    """Images in any number of evaluations, best in few.

    Parameters:
        scheduler: gives the sigmas and takes the steps.
        transformer, unet: the network is one of them.
        vae: decodes latents, where the network makes some. Give yours to `from_pretrained`.
        sigmas: list by number of evaluations (as text); evenly spaced where there is none.
    """

    model_cpu_offload_seq = "transformer->unet->vae"
    _optional_components = ["transformer", "unet", "vae"]  # noqa: RUF012 - so in diffusers

    def __init__(
        self,
        scheduler: FlowMapEulerDiscreteScheduler,
        transformer: ModelMixin | None = None,
        unet: ModelMixin | None = None,
        vae: ModelMixin | None = None,
        sigmas: dict[str, list[float]] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(scheduler=scheduler, transformer=transformer, unet=unet, vae=vae)
        self.register_to_config(sigmas=sigmas or {})

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int] | int | None = None,
        batch_size: int = 1,
        num_inference_steps: int = 1,
        sigmas: list[float] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """The images.

        Args:
            class_labels: one per image, or one for all; -1 is "none", and so is None.
            batch_size: number of images, unless labels or latents tell it.
            num_inference_steps: network evaluations of an image.
            sigmas: noise levels to start from, falling from 1; 0 is added.
            generator: draws the noise.
            latents: the noise itself, [B, C, H, W].
            output_type: "pil", "np" or "pt" in [0, 1], or "latent": what the network makes.
        """
        network = self.transformer if self.transformer is not None else self.unet
        config, device = network.config, self._execution_device
        if latents is not None:
            batch_size = len(latents)
        elif isinstance(class_labels, list):
            batch_size = len(class_labels)
        if not isinstance(class_labels, list):
            class_labels = [-1 if class_labels is None else class_labels] * batch_size
        labels = torch.tensor(class_labels, device=device)
        is_known = ((labels >= -1) & (labels < config.num_classes)).all()
        if len(labels) != batch_size or not is_known:
            raise ValueError(
                f"class_labels={class_labels} must be {batch_size} numbers from -1 (none) to "
                f"{config.num_classes - 1}"
            )
        if self.vae is None and config.in_channels not in (1, 3) and output_type != "latent":
            raise ValueError("this network makes latents: load a vae, or set output_type='latent'")
        shape = (batch_size, config.in_channels, config.sample_size, config.sample_size)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        x = latents.to(device, torch.float32)  # rounded to the network's dtype inside it alone

        count = num_inference_steps if sigmas is None else len(sigmas)
        sigmas = (
            sigmas or self.config.sigmas.get(str(count)) or [1 - n / count for n in range(count)]
        )
        self.scheduler.set_timesteps(count, device=device, sigmas=sigmas)
        steps = [*self.scheduler.timesteps, torch.zeros_like(self.scheduler.timesteps[0])]
        for t, r in self.progress_bar(list(pairwise(steps))):
            (velocity,) = network(x, t, r, class_labels=labels, return_dict=False)
            x = self.scheduler.step(velocity, t, x).prev_sample

        images = self._as_output(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _as_output(self, x: torch.Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return x
        if self.vae is not None:
            shift = getattr(self.vae.config, "shift_factor", None) or 0
            x = x.to(self.vae.dtype) / self.vae.config.scaling_factor + shift
            x = self.vae.decode(x).sample.float()
        if output_type == "pt":
            return (x / 2 + 0.5).clamp(0, 1)
        if output_type == "np":
            return (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
        pixels = ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()
        return [
            Image.fromarray(p[0] if len(p) == 1 else p.transpose(1, 2, 0)) for p in pixels.numpy()
        ]
