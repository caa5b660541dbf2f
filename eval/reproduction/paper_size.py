"""The rows at the paper's size: its data sets, its models, and how much of each is made."""

from pathlib import Path

from eval.reproduction.rows import CLASSES, Cell, Model, Rows, Scale, Size, naive_interval
from eval.reproduction.sample_steps import INCEPTION
from eval.reproduction.steps import DataSet, Prepare

# As the paper trained DiT and SiT; the presets have bf16.
FP32 = ("--train.ds-config", "ds_configs/zero2_fp32.json")
# Of the curriculum in all presets, and so stages of NaiveCL.
CLUSTERS = 20

DATA = {
    "imagenet256": DataSet(
        "imagenet256", Path("data/imagenet256"), Path("VIRTUAL_imagenet256_labeled.npz"), 1.5
    ),
    "ffhq256": DataSet("ffhq256", Path("data/ffhq256"), Path("references/ffhq256.npz"), 1.0),
    "coco256": DataSet(
        "coco256", Path("data/coco256"), Path("references/coco256.npz"), 1.5, captions=True
    ),
    # Pixels, which are compared with themselves.
    "ffhq64": DataSet("ffhq64", Path("data/ffhq64"), Path("data/ffhq64"), 1.0),
    "cifar10": DataSet("cifar10", Path("data/cifar10"), Path("data/cifar10"), 1.5),
}


# ---- models


def _dit(title: str, preset: str, data: str, steps: int, *, shortened: bool = False) -> Model:
    """A DiT in fp32. `shortened`: to 400K steps, whereas its preset trains for longer."""
    options = (*FP32, "--train.steps", str(steps)) if shortened else FP32
    # Under the preset's name it would be taken for the longer training, and the reverse.
    name = f"{preset}_400k" if shortened else preset
    interval = naive_interval(steps, CLUSTERS)
    return Model(title, name, preset, DATA[data], options, "ddpm", 250, interval)


def _sit(preset: str, data: str, steps: int) -> Model:
    """SiT has no DDPM sampler: its own stochastic one, with as many steps."""
    interval = naive_interval(steps, CLUSTERS)
    return Model("SiT-B/2", preset, preset, DATA[data], FP32, "sde", 250, interval)


def _edm(preset: str, data: str, steps: int, *more: str) -> Model:
    """DDPM++ in fp16, which is its preset's."""
    interval = naive_interval(steps, CLUSTERS)
    return Model("EDM, DDPM++", preset, preset, DATA[data], more, "euler", 40, interval)


MODELS = {
    "dit_b2_imagenet256": _dit("DiT-B/2", "dit_b2_imagenet256", "imagenet256", 400_000),
    "dit_b2_imagenet256_linear": _dit(
        "DiT-B/2, linear", "dit_b2_imagenet256_linear", "imagenet256", 400_000
    ),
    "dit_s2_imagenet256": _dit("DiT-S/2", "dit_s2_imagenet256", "imagenet256", 400_000),
    "dit_l2_imagenet256_400k": _dit(
        "DiT-L/2, 400K steps", "dit_l2_imagenet256", "imagenet256", 400_000, shortened=True
    ),
    "dit_l2_imagenet256": _dit("DiT-L/2, 2M steps", "dit_l2_imagenet256", "imagenet256", 2_000_000),
    "sit_b2_imagenet256": _sit("sit_b2_imagenet256", "imagenet256", 400_000),
    "dit_b2_ffhq256": _dit("DiT-B/2", "dit_b2_ffhq256", "ffhq256", 100_000),
    "sit_b2_ffhq256": _sit("sit_b2_ffhq256", "ffhq256", 100_000),
    # 100K steps on FFHQ, as the paper says of it; of CIFAR-10 it does not: EDM's 200M images.
    "edm_ddpmpp_ffhq64": _edm("edm_ddpmpp_ffhq64", "ffhq64", 100_000, "--train.steps", "100000"),
    "edm_ddpmpp_cifar10": _edm("edm_ddpmpp_cifar10", "cifar10", 781_250),
    "dit_b2_coco256": _dit("DiT-B/2", "dit_b2_coco256", "coco256", 400_000),
}


# ---- how much of it


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


PAPER_PREPARE = (
    Cell(
        "imagenet256",
        (
            Prepare(
                Path("data/imagenet256"),
                "data_prep.imagenet",
                (),
                script="IMAGES=ILSVRC2012/train sbatch slurm/pack_imagenet.sh",
            ),
        ),
    ),
    Cell(
        "ffhq256",
        (
            Prepare(
                Path("data/ffhq256"),
                "data_prep.folder",
                _words("--images ffhq --vae stabilityai/sd-vae-ft-ema --out data/ffhq256"),
            ),
            Prepare(
                Path("references/ffhq256.npz"),
                "eval.score",
                _words("--reference ffhq --resize 256 --save-reference references/ffhq256.npz"),
            ),
        ),
    ),
    Cell(
        "ffhq64",
        (
            Prepare(
                Path("data/ffhq64"),
                "data_prep.folder",
                _words("--images ffhq --vae none --resolution 64 --out data/ffhq64"),
            ),
        ),
    ),
    Cell(
        "coco256",
        (
            Prepare(
                Path("data/coco256"),
                "data_prep.coco",
                (),
                script="IMAGES=train2014 sbatch slurm/pack_coco.sh",
            ),
            Prepare(
                Path("references/coco256.npz"),
                "eval.score",
                _words(
                    "--reference train2014 --resize 256 --save-reference references/coco256.npz"
                ),
            ),
        ),
    ),
    Cell(
        "cifar10",
        (
            Prepare(
                Path("data/cifar10"),
                "data_prep.parquet",
                _words(
                    "--files train.parquet --label-column label --vae none --resolution 32 "
                    "--out data/cifar10"
                ),
            ),
        ),
    ),
)
PAPER = Size(
    name="paper",
    models=MODELS,
    scoring=INCEPTION,
    prepare=PAPER_PREPARE,
    samples=50_000,
    curve_samples=10_000,
    curve_every=50_000,
    picture_samples=40,
    class_samples=40,
    classes=CLASSES,
    studies={
        "dit_b2_ffhq256": ("paper", (), FP32),
        "sit_b2_ffhq256": ("paper_sit", (), FP32),
        "edm_ddpmpp_ffhq64": ("paper_edm", (), ()),
        "dit_b2_imagenet256": ("paper", ("--preset", "dit_b2_imagenet256"), FP32),
    },
)


def paper(root: Path) -> Scale:
    """The rows at the paper's size."""
    return Rows(root, PAPER).scale()
