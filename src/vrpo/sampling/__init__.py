"""Drawing images: labels, noise and pixels of sample i are functions of (seed, i) alone."""

from vrpo.sampling.files import grid_image, image_format, write_images
from vrpo.sampling.labels import LabelPolicy, sample_labels
from vrpo.sampling.sampler import DTYPES, ImageSampler, build_denoising, check_sampling
from vrpo.sampling.source import LoadedRun, RunSampler, load_run

__all__ = [
    "DTYPES",
    "ImageSampler",
    "LabelPolicy",
    "LoadedRun",
    "RunSampler",
    "build_denoising",
    "check_sampling",
    "grid_image",
    "image_format",
    "load_run",
    "sample_labels",
    "write_images",
]
