"""Images to latents and back, by an autoencoder of diffusers, one of TAESD's family, or a file of
latent-diffusion's."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from largescale.encoders.identity import library, loading, locate, silence, weights_identity
from largescale.encoders.ldm_vae import load_ldm_vae
from largescale.encoders.normalization import Normalization
from largescale.errors import ConfigError, DataError

# Of a VAE in one file.
WEIGHT_FILES = (".pt", ".pth", ".ckpt", ".safetensors")
CLASSES = (
    "AutoencoderKL",
    "AutoencoderTiny",
    "AutoencoderDC",
    "AutoencoderRAE",
    "AutoencoderKLFlux2",
    "AutoencoderKLHunyuanImage",
    "AsymmetricAutoencoderKL",
)


@dataclass(frozen=True, slots=True)
class Vae:
    identity: str  # class and hash of the weights, wherever they came from
    kind: Literal["latents", "moments"]  # moments: mean, then log-variance (AutoencoderKL)
    latent_channels: int
    downsampling: int  # image side / latent side
    normalization: Normalization  # from what encode returns to x_start
    shift_factor: float  # already subtracted from what encode returns
    device: torch.device
    dtype: torch.dtype  # of the computation
    module: Any = field(repr=False)
    patch: int = 1  # pixels of the module's latent, a side, that are one of ours (Flux 2)
    unit_range: bool = False  # the module's pixels lie in [0, 1], not [-1, 1] (RAE)
    only_resolution: int | None = None  # where the module takes one (RAE)

    @property
    def scale_factor(self) -> float:
        return self.normalization.scale_factor

    def stored_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, H, W) of one encoded image: C is twice latent_channels for moments. Raises
        DataError."""
        if resolution < 1 or resolution % self.downsampling:
            below = resolution // self.downsampling * self.downsampling
            raise DataError(
                f"resolution {resolution} is not a multiple of {self.downsampling}, by which the "
                f"VAE scales down; try {max(below, self.downsampling)} or "
                f"{below + self.downsampling}"
            )
        if self.only_resolution not in (None, resolution):
            raise DataError(
                f"resolution {resolution} is not the {self.only_resolution} pixels that this "
                f"{type(self.module).__name__} was made for; try {self.only_resolution}"
            )
        side = resolution // self.downsampling
        return self.latent_channels * (2 if self.kind == "moments" else 1), side, side

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, R, R) uint8 on any device -> (B, C or 2 C, H, W) float16 on the VAE's. DataError
        if not finite."""
        x = images.to(self.device).float()
        x = x / 255 if self.unit_range else x / 127.5 - 1
        encoded = self.module.encode(
            x.to(self.dtype, memory_format=_memory_format(self.device)), return_dict=False
        )[0]
        if self.kind == "moments":
            encoded = encoded.parameters  # (B, 2 C, H, W)
        encoded = encoded.float()
        if self.patch > 1:
            encoded = F.pixel_unshuffle(encoded, self.patch)
        # Of moments, the means only.
        encoded[:, : self.latent_channels] -= self.shift_factor
        encoded = encoded.half().contiguous()
        if not encoded.isfinite().all():
            raise DataError(
                f"this VAE's latents are not finite when computed in {self.dtype} and stored in "
                "float16" + ("" if self.dtype == torch.float32 else "; try float32")
            )
        return encoded

    @torch.inference_mode()
    def decode(self, x_start: Tensor) -> Tensor:
        """(B, C, H, W) float -> (B, 3, R, R) uint8 on the CPU."""
        latent = self.normalization.undo(x_start.to(self.device).float()) + self.shift_factor
        if self.patch > 1:
            latent = F.pixel_shuffle(latent, self.patch)
        latent = latent.to(self.dtype, memory_format=_memory_format(self.device))
        images = self.module.decode(latent, return_dict=False)[0].float()
        images = images * 255 if self.unit_range else (images + 1) * 127.5
        return images.round().clamp(0, 255).byte().cpu().contiguous()

    @torch.inference_mode()
    def fit_rgb(self, x_start: Tensor) -> list[list[float]]:
        """Least squares from a latent's channels, and 1, to the mean colour, in [-1, 1], of the
        pixels that it becomes: (B, C, H, W) -> (C + 1, 3). `images.linear_rgb` draws pictures with
        it, without the VAE."""
        # One by one: a batch would need the memory of all.
        pictures = torch.cat([self.decode(x) for x in x_start.split(1)])
        colours = F.avg_pool2d(pictures.double() / 127.5 - 1, self.downsampling)
        channels = F.pad(x_start.cpu().double(), (0, 0, 0, 0, 0, 1), value=1.0)

        # A row for each place of each latent.
        inputs = channels.movedim(1, -1).flatten(0, -2)
        outputs = colours.movedim(1, -1).flatten(0, -2)
        solution = torch.linalg.lstsq(inputs, outputs, driver="gelsd").solution
        rows = []
        for row in solution.tolist():
            rows.append([round(value, 4) for value in row])
        return rows

    @property
    def nbytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.module.parameters())

    def decoding_bytes(self, side: int) -> int:
        """An estimate of the memory that decoding one image of so many pixels a side takes beside
        the weights, in float32. With the VAE of Stable Diffusion at 256 pixels it was 0.43 GB on a
        CPU."""
        config = self.module.config
        # Some classes name those of their decoder apart; RAE's has none, as it is a transformer.
        widths = (
            config.get("decoder_block_out_channels") or config.get("block_out_channels") or (3,)
        )
        # Feature maps of the full resolution, of 4 bytes a value.
        return 6 * max(widths[:2]) * side**2 * 4

    def normalized(self, normalization: Normalization) -> "Vae":
        """The VAE that decodes x_start as a data set or model has it."""
        return replace(self, normalization=normalization)

    def moved(self, device: torch.device) -> "Vae":
        """The VAE on another device, where it moves to."""
        module = self.module.to(device, memory_format=_memory_format(device))
        return replace(self, device=device, module=module)


def load_vae(spec: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Vae:
    """Loads the VAE that `spec` names. Raises DataError.

    spec: a hub name or a folder in diffusers' layout, of the VAE or of a pipeline with a subfolder
    `vae`; a folder with one pair NAME_encoder.pth, NAME_decoder.pth of github madebyollin/taesd
    (taesd, taesdxl, taesd3, taef1, taef2); or a file of weights under latent-diffusion's names,
    such as VA-VAE's.
    """
    folder = Path(spec).expanduser()
    pairs = set()
    for part in ("encoder", "decoder"):
        for file in folder.glob(f"*_{part}.pth"):
            pairs.add(file.name.removesuffix(f"_{part}.pth"))
    if folder.is_file() and folder.suffix in WEIGHT_FILES:
        module = load_ldm_vae(folder)
    else:
        module = _load_taesd(folder, sorted(pairs)) if pairs else _load_diffusers(spec)

    # Identity and statistics are of float32, so they come before the cast. RAE's latents depend on
    # statistics that are buffers.
    buffers = type(module).__name__ == "AutoencoderRAE"
    identity = f"{type(module).__name__} {weights_identity(module, buffers)}"
    facts = _facts(module)
    with silence():  # diffusers reports that none of its modules need to stay in float32
        module.eval().requires_grad_(False)
        module = module.to(device, dtype, memory_format=_memory_format(device))

    return Vae(identity=identity, device=device, dtype=dtype, module=module, **facts)


def _facts(module: Any) -> dict[str, Any]:
    """What the module's config says of its latents, by `Vae`'s names."""
    config = module.config
    name = type(module).__name__
    # RAE's own encode normalises its latents.
    if name == "AutoencoderRAE":
        grid = config.encoder_input_size // config.encoder_patch_size
        return {
            "kind": "latents",
            "latent_channels": config.encoder_hidden_size,
            "downsampling": config.patch_size,
            "normalization": Normalization(),
            "shift_factor": 0.0,
            "unit_range": True,
            "only_resolution": config.patch_size * grid,
        }

    # Several classes name the widths of their encoder apart.
    widths = config.get("encoder_block_out_channels") or config.get("down_block_out_channels")
    downsampling = config.get("spatial_compression_ratio")
    normalization = _normalization(config)
    facts = {
        "kind": "moments" if "KL" in name else "latents",
        "latent_channels": config.latent_channels,
        "downsampling": downsampling or 2 ** (len(widths or config.block_out_channels) - 1),
        "normalization": normalization,
        # Pipelines of diffusers that know a mean take no shift.
        "shift_factor": 0.0 if normalization.mean else config.get("shift_factor") or 0.0,
    }
    if name == "AutoencoderKLFlux2":
        facts |= _of_flux2(module, facts)
    return facts


def _normalization(config: Any) -> Normalization:
    """What diffusers' pipelines do to a latent. Raises DataError for statistics that do not fit it."""
    scale_factor = config.get("scaling_factor") or 1.0
    mean, std = config.get("latents_mean"), config.get("latents_std")
    # They look at both or none.
    if not mean or not std:
        return Normalization(scale_factor)
    channels = config.latent_channels
    if not len(mean) == len(std) == channels or not min(std) > 0:
        raise DataError(
            f"latents_mean and latents_std in the VAE's config.json have {len(mean)} and "
            f"{len(std)} values, the latents {channels} channels, and std has to be above 0; they "
            "are another encoder's: fetch the config anew"
        )
    return Normalization(scale_factor, tuple(map(float, mean)), tuple(map(float, std)))


def _of_flux2(module: Any, facts: dict[str, Any]) -> dict[str, Any]:
    """Facts of Flux 2's VAE, whose 2 x 2 pixels of a latent are one of 4 times the channels,
    normalised by running statistics that lie with the weights."""
    patch = module.config.patch_size[0]
    norm = module.bn
    std = (norm.running_var.double() + norm.eps).sqrt()
    return {
        "patch": patch,
        "latent_channels": facts["latent_channels"] * patch**2,
        "downsampling": facts["downsampling"] * patch,
        "normalization": Normalization(
            1.0, tuple(norm.running_mean.double().tolist()), tuple(std.tolist())
        ),
    }


def load_vae_of_model(
    spec: str, trained_with: str | None, normalization: Normalization, device: torch.device
) -> Vae:
    """The VAE that `spec` names, where it is the one that made a model's latents, by its identity
    `trained_with`; it decodes what the model draws, which is normalised so. Raises ConfigError for
    another one, DataError where there is none."""
    # A model of pixels, or of latents of unknown origin, has nothing to compare the VAE with.
    if trained_with is None:
        raise ConfigError(
            "the model draws pixels, or latents of no VAE that its data name; leave out vae (--vae)"
        )
    vae = load_vae(spec, device)
    # Latents of another VAE decode to something that looks nearly right.
    if vae.identity != trained_with:
        raise ConfigError(
            f"the VAE {spec} is {vae.identity}, the model was trained with {trained_with}"
        )
    return vae.normalized(normalization)


def _memory_format(device: torch.device) -> torch.memory_format:
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def _load_diffusers(spec: str) -> Any:
    """One of CLASSES in float32, as diffusers saves it."""
    source, remedy = locate(spec, "--vae DIR")

    # A VAE's own folder, or that of a pipeline with one in it.
    subfolders = ["", "vae"]
    if Path(source).is_dir():
        subfolders = [s for s in subfolders if (Path(source) / s / "config.json").is_file()]
        if not subfolders:
            raise DataError(
                f"{spec} has neither config.json and weights as diffusers saves a VAE (also in a "
                "subfolder vae), nor NAME_encoder.pth and NAME_decoder.pth as TAESD has them"
            )
    diffusers = library("diffusers")
    with loading(spec, remedy):
        diffusers.utils.logging.disable_progress_bar()
        subfolder, class_name = _find_config(diffusers, source, subfolders)
        if class_name not in CLASSES:
            raise DataError(
                f"{spec} is of class {class_name}; the VAEs that work are {', '.join(CLASSES)}"
            )
        module, report = getattr(diffusers, class_name).from_pretrained(
            source, subfolder=subfolder, torch_dtype=torch.float32, output_loading_info=True
        )

    # diffusers itself would continue with random weights.
    if unfit := [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]:
        raise DataError(
            f"the weights in {spec} do not fit its config.json: {len(unfit)} are missing or too "
            f"many, the first is {unfit[0]}; fetch both anew"
        )
    return module


def _find_config(diffusers: Any, spec: str, subfolders: list[str]) -> tuple[str, str | None]:
    """The subfolder that holds a VAE, and its class name. Where none does, those of a config that
    is there."""
    found: tuple[str, str | None] | None = None
    failure: OSError | None = None
    # A pipeline's own config comes before its vae's, and is of another class.
    for subfolder in subfolders:
        try:
            config = diffusers.AutoencoderKL.load_config(spec, subfolder=subfolder)
            class_name = config.get("_class_name")
        except OSError as error:
            failure = failure or error
            continue
        found = (subfolder, class_name)
        if class_name in CLASSES:
            break
    if found is None:
        raise failure or AssertionError("no subfolders")
    return found


class _NormedBlock(nn.Module):
    """A block of AutoencoderTiny after a residual group norm, which TAEF2 has at its lowest
    resolution."""

    def __init__(self, block: Any):
        super().__init__()
        self.conv, self.skip, self.fuse = block.conv, block.skip, block.fuse
        n = block.conv[0].in_channels
        self.pool = nn.Sequential(
            nn.Conv2d(n, 4 * n, 1, bias=False),
            nn.GroupNorm(4, 4 * n),
            nn.ReLU(),
            nn.Conv2d(4 * n, n, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.pool(x)
        return self.fuse(self.conv(x) + self.skip(x))


def _load_taesd(folder: Path, pairs: list[str]) -> Any:
    """AutoencoderTiny with the weights of the one pair of files in `folder`."""
    if len(pairs) > 1:
        raise DataError(
            f"{folder} holds several of TAESD's family ({', '.join(pairs)}); give a folder with "
            "one pair"
        )
    encoder = folder / f"{pairs[0]}_encoder.pth"
    decoder = folder / f"{pairs[0]}_decoder.pth"
    for path in (encoder, decoder):
        if not path.is_file():
            raise DataError(
                f"{path} is missing; encoder and decoder are needed, from "
                "github.com/madebyollin/taesd"
            )
    diffusers = library("diffusers")
    with loading(
        str(folder),
        "members of TAESD's family that scale down by 8 work, from github.com/madebyollin/taesd",
    ):
        encoder_weights = torch.load(encoder, map_location="cpu", weights_only=True)
        decoder_weights = torch.load(decoder, map_location="cpu", weights_only=True)

        # The encoder's last layer has as many outputs as a latent has channels.
        last = max(encoder_weights, key=_layer_number)
        module = diffusers.AutoencoderTiny(latent_channels=encoder_weights[last].shape[0])
        # The decoder's layer 0 is a clamp, which in diffusers is a part of forward().
        _fill(module.encoder.layers, encoder_weights, first=0)
        _fill(module.decoder.layers, decoder_weights, first=1)
    return module


def _layer_number(name: str) -> int:
    """The number that a weight's name starts with."""
    return int(name.partition(".")[0])


def _fill(layers: nn.Sequential, weights: dict[str, Tensor], first: int) -> None:
    """Loads weights whose names count the layers from `first`."""
    renamed = {}
    normed = set()
    for name, tensor in weights.items():
        number = _layer_number(name) - first
        renamed[f"{number}.{name.partition('.')[2]}"] = tensor
        if ".pool." in name:
            normed.add(number)
    for number in normed:
        layers[number] = _NormedBlock(layers[number])
    layers.load_state_dict(renamed)
