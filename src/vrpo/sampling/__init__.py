"""Drawing images: labels, noise and pixels of sample i are functions of (seed, i) alone."""

from vrpo.sampling.files import grid_image, image_format
from vrpo.sampling.labels import LabelPolicy, find_class, sample_labels
from vrpo.sampling.sampler import ImageSampler, build_denoising, check_sampling
from vrpo.sampling.source import LoadedRun, RunSampler, load_run

__all__ = [
    "ImageSampler",
    "LabelPolicy",
    "LoadedRun",
    "RunSampler",
    "build_denoising",
    "check_sampling",
    "find_class",
    "grid_image",
    "image_format",
    "load_run",
    "sample_labels",
]
