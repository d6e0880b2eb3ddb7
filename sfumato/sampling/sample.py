"""Images sampled from a model: the same code while training and for `sfumato sample`."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count, groupby, pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from sfumato.data.batch import Cond
from sfumato.data.store import Progress
from sfumato.errors import UserError
from sfumato.models.base import T_NEXT, Models, SampleInfo, check_sizes, device_and_dtype
from sfumato.models.streaming import encode_each
from sfumato.sampling import image_files
from sfumato.sampling.following import following
from sfumato.sampling.prompts import OWN, SAMPLERS, Prompt, default, of_no_use, own
from sfumato.sampling.prompts import sampler as own_name
from sfumato.tensors.guidance import Guidance, GuidanceInfo
from sfumato.tensors.noise import NoiseProcess
from sfumato.tensors.random import key

EncodedPrompts = Mapping[tuple[str, bool], Mapping[str, Tensor]]
"""(prompt, whether it is a negative one) -> the outputs of the text encoders for it, by name, on the CPU."""
log = logging.getLogger(__name__)


def sample(
    models: Models,
    prompts: Sequence[Prompt],
    folder: Path,
    *,
    process: NoiseProcess,
    name: str,
    sampler: str = "ddim",
    epoch: int | None = None,
    step: int | None = None,
    seed: int = 42,
    rank: int = 0,
    world: int = 1,
    progress: Progress | None = None,
    encoded: EncodedPrompts | None = None,
    device: torch.device | None = None,
) -> list[Path]:
    """Write an image of each prompt into `folder` and return the files, in the prompts' order.

    A prompt without a seed gets one of (`seed`, its place in the list), the same each time, so that images of
    one run can be compared. Process `rank` of `world` samples every world-th prompt. `progress`: (done, all) steps of
    the denoiser. Raises `UserError` for a sampler that is unknown or does not fit the process.
    """
    places = range(rank, len(prompts), world)
    seeded = [replace(prompts[i], seed=seed_of(prompts[i], i, seed)) for i in places]
    images = generate(
        models, seeded, process=process, sampler=sampler, progress=progress, encoded=encoded, device=device
    )
    paths = []
    for place, prompt, image in zip(places, seeded, images, strict=True):
        path = folder / image_files.file_name(name, place, epoch=epoch, step=step, seed=prompts[place].seed)
        image_files.save(image, path, prompt, prompt.sample_sampler or sampler)
        paths.append(path)
    return paths


def seed_of(prompt: Prompt, place: int, seed: int) -> int:
    """The prompt's own seed, or a fixed one for its `place` in a run seeded with `seed`."""
    return prompt.seed if prompt.seed is not None else key("sample", seed, place) % 2**32


def generate(
    models: Models,
    prompts: Sequence[Prompt],
    *,
    process: NoiseProcess,
    sampler: str = "ddim",
    batch_size: int = 1,
    progress: Progress | None = None,
    encoded: EncodedPrompts | None = None,
    device: torch.device | None = None,
) -> list[Image.Image]:
    """One image per prompt. See `sample_latents`, which does all but the decoding.

    `encoded`: of `encode_prompts`; None: the prompts are encoded now. `device`: where the nets are brought while they
    are used, the text encoders, the denoiser and the VAE in turn; None: they are used where they are.
    """
    encoded = encoded or encode_prompts(models, prompts, device)
    with on_device(models.denoising(), device):
        latents = sample_latents(
            models, prompts, process=process, sampler=sampler, batch_size=batch_size, progress=progress, encoded=encoded
        )
    with on_device([models.vae], device):
        return [decode(models, one, prompt) for one, prompt in zip(latents, prompts, strict=True)]


@contextmanager
def on_device(nets: Sequence[nn.Module], device: torch.device | None) -> Iterator[None]:
    """Nets on `device`; afterwards each is where it was."""
    before = [device_and_dtype(net)[0] for net in nets]
    for net in nets:
        net.to(device)
    try:
        yield
    finally:
        for net, old in zip(nets, before, strict=True):
            net.to(old)


def sample_latents(
    models: Models,
    prompts: Sequence[Prompt],
    *,
    process: NoiseProcess,
    sampler: str = "ddim",
    noise: Tensor | None = None,
    batch_size: int = 1,
    progress: Progress | None = None,
    encoded: EncodedPrompts | None = None,
) -> list[Tensor]:
    """One latent (c, h, w) per prompt, scaled as the denoiser takes it, fp32 on the denoiser's device.

    Neighbouring prompts of one size, sampler and number of steps are sampled together, up to `batch_size`. Each
    starts from its own seed's noise (0 if it has none), made on the CPU, so that neither company nor device
    changes an image. `noise` (n, c, h, w), of unit deviation, stands in for that of the seeds.

    Works under autocast and with nets in 16 bits; nets are in eval mode for the while and get their modes back.
    """
    _warn_of_no_effect(prompts, models)
    check_prompts(models, prompts, sampler)
    groups = [
        alike[i : i + batch_size]
        for alike in (list(g) for _, g in groupby(range(len(prompts)), lambda i: _shape(prompts[i], models, sampler)))
        for i in range(0, len(alike), batch_size)
    ]
    schedulers = [_scheduler(models, process, prompts[group[0]], sampler) for group in groups]
    total, done = sum(len(scheduler.timesteps) for scheduler in schedulers), count(1)

    def advance() -> None:
        if progress:
            progress(next(done), total)

    encoded = encoded or encode_prompts(models, prompts)
    latents: list[Tensor] = []
    with torch.no_grad(), _evaluating(models.denoising()):
        for group, scheduler in zip(groups, schedulers, strict=True):
            start, alike = None if noise is None else noise[group], [prompts[i] for i in group]
            _, height, width = (side * models.family.latents.stride for side in _latent_shape(models, alike[0]))
            with following(models, alike, width, height):
                latents += _denoise(models, alike, scheduler, start, encoded, advance)
    return latents


def decode(models: Models, latents: Tensor, prompt: Prompt) -> Image.Image:
    """A latent (c, h, w) as the denoiser gives it -> the image."""
    with _evaluating([models.vae]):
        (pixels,) = models.decode(latents[None])
    if not pixels.isfinite().all():
        cause = (
            "the VAE overflowed: try --no_half_vae"
            if latents.isfinite().all()
            else "the denoiser gave NaN: the training has diverged"
        )
        log.warning("the image of %r is not finite and partly black; %s", prompt.prompt, cause)
    levels = ((pixels.nan_to_num(-1) / 2 + 0.5).clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).numpy())


class Euler:
    """Integrates a rectified flow in straight steps, with the calls of diffusers' schedulers."""

    init_noise_sigma = 1.0

    def __init__(self, sigmas: Tensor) -> None:
        """`sigmas` (steps + 1,): noise levels from 1 to 0."""
        self.sigmas, self.timesteps = sigmas, sigmas[:-1] * 1000
        self.index = 0

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """The net takes the sample as it is."""
        return sample

    def step(
        self, model_output: Tensor, timestep: Tensor, sample: Tensor, *, return_dict: bool = False
    ) -> tuple[Tensor]:
        """The sample at the next noise level, along the predicted velocity."""
        here, there = self.sigmas[self.index : self.index + 2]
        self.index += 1
        return (sample + (there - here) * model_output,)


def _scheduler(models: Models, process: NoiseProcess, prompt: Prompt, sampler: str) -> Any:
    """The scheduler of a prompt, with its timesteps set."""
    name, device = _sampler(models, prompt, sampler), device_and_dtype(models.denoiser)[0]
    if models.family.sigmas is None:
        scheduler = scheduler_for(process, name)
        scheduler.set_timesteps(prompt.sample_steps, device=device)
        return scheduler
    _, height, width = _latent_shape(models, prompt)
    shift = own(prompt, default(models.options)).get("flow_shift")
    return Euler(models.family.sigmas(models, prompt.sample_steps, height * width, shift).to(device))


def scheduler_for(process: NoiseProcess, sampler: str) -> Any:
    """The diffusers scheduler of a sampler's name, set up for the process."""
    import diffusers

    class_name, extra = SAMPLERS[own_name(sampler)]
    kind, config = getattr(diffusers, class_name), process.scheduler_config()
    known = inspect.signature(kind).parameters
    if config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in known:
        raise UserError(
            f"sample_sampler {sampler}: cannot begin at zero signal, as zero_terminal_snr asks; take ddim, euler or "
            "dpmsolver++"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the first-generation solver is on its way out of diffusers
            return kind(**{k: v for k, v in {**config, **extra}.items() if k in known})
    except ImportError as error:
        raise UserError(f"sample_sampler {sampler}: needs scipy; run `pip install scipy`, or take another") from error


def encode_prompts(models: Models, prompts: Sequence[Prompt], device: torch.device | None = None) -> EncodedPrompts:
    """The prompts, negative ones too, through the text encoders; `device`: as in `generate`. Those that are streamed
    are read once for all prompts."""
    texts = dict.fromkeys(
        text for p in prompts for text in ([(p.negative_prompt, True)] if p.scale > 1 else []) + [(p.prompt, False)]
    )
    _warn_of_cut(models, [text for text, negative in texts if not (negative and models.family.tokenize_negative)])
    nets = [net for name, net in models.encoders.items() if name not in models.streamed]
    where = device or device_and_dtype(models.denoiser)[0]
    encoded = {}
    with on_device(nets, device), _evaluating(nets):
        batches, negative = [[text] for text, _ in texts], [negative for _, negative in texts]
        for text, cond in zip(texts, encode_each(models, batches, where, negative=negative), strict=True):
            encoded[text] = {name: t.cpu() for name, t in models.outputs.entry(cond, 0).items()}
    return encoded


def _sample_info(models: Models, prompts: Sequence[Prompt]) -> SampleInfo:
    """What the denoiser takes besides text: prompts are whole images of their own size."""
    device = device_and_dtype(models.denoiser)[0]
    guidance = [p.guidance_scale for p in prompts]
    return SampleInfo(
        sizes=torch.tensor([[p.height, p.width, 0, 0, p.height, p.width] for p in prompts], device=device),
        guidance=None if None in guidance else torch.tensor(guidance, device=device),
    )


def _denoise(
    models: Models,
    prompts: Sequence[Prompt],
    scheduler: Any,
    noise: Tensor | None,
    encoded: EncodedPrompts,
    advance: Callable[[], None],
) -> list[Tensor]:
    """From noise to latents, along the scheduler's timesteps; `advance` is called after each."""
    device, dtype = device_and_dtype(models.denoiser)
    generators = [torch.Generator().manual_seed(p.seed or 0) for p in prompts]
    if noise is None:
        noise = torch.cat(
            [torch.randn((1, *_latent_shape(models, p)), generator=g) for p, g in zip(prompts, generators, strict=True)]
        )
    x = noise.to(device, torch.float32) * scheduler.init_noise_sigma
    guided = prompts[0].scale > 1
    captions = ([(p.negative_prompt, True) for p in prompts] if guided else []) + [(p.prompt, False) for p in prompts]
    text = {n: t.to(device) for n, t in models.outputs.join([encoded[caption] for caption in captions]).items()}
    cond = models.condition(text, _sample_info(models, [*prompts, *prompts] if guided else prompts))
    cond = {n: t.to(device, dtype if t.is_floating_point() else None) for n, t in cond.items()}
    alone = {n: t[len(x) :] for n, t in cond.items()} if guided else cond
    rule = _guidance(models, prompts, alone, len(scheduler.timesteps)) if guided else None
    # Samplers that add noise on the way take it from each image's own generator as well.
    extra = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    times = [*scheduler.timesteps, torch.zeros_like(scheduler.timesteps[0])]
    for step, (t, t_next) in enumerate(pairwise(times)):
        both = rule is not None and rule.uses_negative(step)
        model_input = scheduler.scale_model_input(torch.cat([x, x]) if both else x, t)
        # fp32 whatever the net's format: 16 bits would round them.
        timestep, next_one = (time.float().expand(len(model_input)) for time in (t, t_next))
        said = {**(cond if both else alone), T_NEXT: next_one}
        prediction = models.predict(model_input.to(dtype), timestep, said).float()
        if rule is not None and both:
            negative, positive = prediction.chunk(2)
            prediction = rule.combine(positive, negative, step)
        x = scheduler.step(prediction, t, x, **extra, return_dict=False)[0]
        advance()
    return list(x)


def _guidance(models: Models, prompts: Sequence[Prompt], cond: Cond, steps: int) -> Guidance:
    """The guidance of prompts that are sampled together; `cond`: theirs, without the negative ones'."""
    scale = torch.tensor([p.scale for p in prompts], device=device_and_dtype(models.denoiser)[0]).view(-1, 1, 1, 1)
    values = own(prompts[0], default(models.options))
    return models.family.guidance(models, GuidanceInfo(scale=scale, steps=steps, cond=cond, values=values))


def check_prompts(models: Models, prompts: Sequence[Prompt], sampler: str) -> None:
    """Errors: `UserError` for images that are too large or too small for the model, and for samplers and options that
    do not fit it."""
    plain, least = default(models.options), models.family.latents.multiple
    for p in prompts:
        if min(p.width, p.height) < least:
            raise UserError(f"the prompt {p.prompt!r}: {p.width}x{p.height}: both sides must be at least {least}")
        if wrong := of_no_use((name for name in OWN if getattr(p, name) is not None), plain):
            raise UserError(*(f"the prompt {p.prompt!r}: {message}" for message in wrong))
    check_sizes(
        models, ((f"the prompt {p.prompt!r}", p.width, p.height, "lower its width and height") for p in prompts)
    )
    for p in prompts:
        _sampler(models, p, sampler)


def check_samplers(models: Models, process: NoiseProcess, prompts: Sequence[Prompt], sampler: str) -> None:
    """Errors: `UserError` for samplers that do not fit the process, or need a library that is not installed."""
    if models.family.sigmas is None:
        for name in dict.fromkeys(_sampler(models, p, sampler) for p in prompts):
            scheduler_for(process, name)


def _sampler(models: Models, prompt: Prompt, sampler: str) -> str:
    """The name of the prompt's sampler, or of the run's."""
    name = own_name(prompt.sample_sampler or sampler)
    if models.family.sigmas is not None and name != "euler":
        raise UserError(f"sample_sampler {name}: {models.family.title} is sampled with euler")
    return name


def _warn_of_no_effect(prompts: Sequence[Prompt], models: Models) -> None:
    multiple = models.family.latents.multiple
    distilled = default(models.options).guidance_scale is not None
    for p in prompts:
        if p.width % multiple or p.height % multiple:
            log.warning("%dx%d: sides are cut to multiples of %d", p.width, p.height, multiple)
        if p.guidance_scale is not None and not distilled:
            log.warning(
                "guidance_scale (--g) has no effect: it is for models distilled with guidance; scale (--l) guides this "
                "one"
            )


def _warn_of_cut(models: Models, texts: Sequence[str]) -> None:
    for limit in models.tokenize_strategy.limits():
        cure = f"; {limit.raised_by} makes it take more" if limit.raised_by else ""
        for text, found in zip(texts, limit.count(texts), strict=True):
            if found > limit.tokens:
                log.warning(
                    "the prompt '%.40s ...' has %d tokens, and %s reads %d%s",
                    text, found, limit.encoder, limit.tokens, cure,
                )  # fmt: skip


def _shape(prompt: Prompt, models: Models, sampler: str) -> tuple[object, ...]:
    """What images must share to be sampled together."""
    values = own(prompt, default(models.options))
    return (
        *_latent_shape(models, prompt), prompt.sample_steps, prompt.sample_sampler or sampler, prompt.scale > 1,
        prompt.controlnet_image is None, *values.items(),
    )  # fmt: skip


def _latent_shape(models: Models, prompt: Prompt) -> tuple[int, int, int]:
    facts = models.family.latents
    height, width = (side // facts.multiple * facts.patch for side in (prompt.height, prompt.width))
    return facts.channels, height, width


@contextmanager
def _evaluating(nets: Sequence[nn.Module]) -> Iterator[None]:
    """Nets in eval mode; each part gets its own mode back, whatever happens."""
    modes: Mapping[nn.Module, bool] = {part: part.training for net in nets for part in net.modules()}
    try:
        for net in nets:
            net.eval()
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
