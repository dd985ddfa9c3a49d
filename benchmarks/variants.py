"""The variants that the benchmark of objectives knows by name: objectives, and the ablations of VRPO."""

from __future__ import annotations

import re
from dataclasses import dataclass

from vrpo.config_load import OBJECTIVES
from vrpo.errors import ConfigError, nearest


@dataclass(frozen=True)
class Variant:
    """An objective with changes to its configuration, by dotted key; ``about`` says what it is for."""

    name: str
    objective: str
    changes: dict[str, str]
    about: str = ""

    @property
    def words(self) -> list[str]:
        """The changes as words of the command line."""
        return [word for key, value in self.changes.items() for word in (f"--{key}", *value.split())]

    @property
    def folder(self) -> str:
        """The name as part of a file's name."""
        return re.sub(r"[^A-Za-z0-9.=+-]+", "-", self.name).strip("-.")


def _vrpo(name: str, about: str, **changes: str | float | bool) -> Variant:
    return Variant(name, "vrpo", {f"align.vrpo.{key}": str(value) for key, value in changes.items()}, about)


def _sampled(name: str, about: str, **changes: str | float | bool) -> Variant:
    return _vrpo(name, about, mode="sampled", **changes)


SCAFFOLD = {"align.scaffold.supply": "advantage"}
ALWAYS = {"align.scaffold.internalise": "always"}
_TABLE = [
    Variant("none", "none", {}, "plain denoising"),
    Variant("repa", "repa", {}, "the baseline"),
    Variant("irepa", "irepa", {}, "convolutional projector, spatially normalised targets, weight 1"),
    Variant("contrastive", "contrastive", {}, "InfoNCE against other images"),
    Variant("haste", "haste", {}, "REPA and attention alignment, ended at 40% of the budget"),
    Variant("repi", "repi", {}, "REPA and a scaffold under a clock"),
    Variant("repi-always", "repi", ALWAYS, "REPI that internalises from the beginning"),
    Variant("reg", "reg", {}, "REPA and a representation token"),
    Variant("repi-reg", "repi", {"align.token.use": "True"}, "both"),
    Variant(
        "reg-noisings-4", "reg", {"train.noisings": "4", "align.token.pair": "time"}, "REG, 4 noisings of one time"
    ),
    Variant("vrpo-scaffold", "vrpo", SCAFFOLD, "VRPO and the scaffold by advantage"),
    Variant("vrpo-scaffold-always", "vrpo", SCAFFOLD | ALWAYS, "the same, which internalises from the beginning"),
    Variant("vrpo-clock", "vrpo", {"align.scaffold.supply": "clock"}, "VRPO and REPI's scaffold"),
    Variant("vrpo-token", "vrpo", {"align.token.use": "True"}, "VRPO and a representation token"),
    Variant("vrpo-scaffold-token", "vrpo", SCAFFOLD | {"align.token.use": "True"}, "VRPO, both inside the trunk"),
    Variant("repa-scaffold", "repa", SCAFFOLD, "REPA and the scaffold by advantage"),
    *(
        Variant(
            f"vrpo-token-policy-{pair}",
            "vrpo",
            {"align.token.use": "True", "align.token.tau": "1", "align.token.pair": pair, "train.noisings": "4"},
            f"VRPO and the token policy, 4 noisings that share {shared}",
        )
        for pair, shared in (("time", "their time"), ("noise", "time and image noise"))
    ),
    Variant("vrpo", "vrpo", {}, "the method at its defaults"),
    _vrpo(
        "vrpo-as-repa",
        "alpha 1, no gate, no trust region: must equal repa to the bit on a CPU",
        alpha_end=1,
        gate=False,
        trust=0,
    ),
    *(
        _vrpo(f"vrpo-no-{reward}", f"without the {reward} reward", **{reward: 0})
        for reward in ("semantic", "relational", "fidelity", "perceptual")
    ),
    *(
        _vrpo(
            f"vrpo-only-{reward}",
            f"the {reward} reward alone",
            **{other: 0 for other in ("semantic", "relational", "fidelity", "perceptual") if other != reward},
        )
        for reward in ("semantic", "relational", "fidelity", "perceptual")
    ),
    *(
        _vrpo(f"vrpo-{rule}", f"advantages normalised by the rule '{rule}'", advantage=rule)
        for rule in ("sum", "per-reward", "centred")
    ),
    _sampled("vrpo-sampled", "sampled actions, G = 8, in place of the closed form"),
    _sampled("vrpo-isotropic", "sampled actions in all tangent directions", basis="isotropic"),
    *(_sampled(f"vrpo-group-{size}", f"sampled, G = {size}", group=size) for size in (2, 4, 16, 32)),
    *(
        _sampled(f"vrpo-radius-{radius}", f"sampled, radius s = {radius} throughout", radius=radius, adapt_radius=False)
        for radius in (0.1, 0.3, 1.0)
    ),
    _vrpo("vrpo-no-gate", "omega = 1", gate=False),
    _vrpo("repa-gate", "the gate alone: REPA times omega, no policy, no trust region", alpha_end=1, trust=0),
    _sampled("vrpo-shuffled", "sampled, advantages shuffled within the group: no signal", shuffle_advantages=True),
    _vrpo("vrpo-noise", "random directions in place of the rewards' preferences", noise_preferences=True),
    *(_vrpo(f"vrpo-alpha-{end}", f"a share of {end} of REPA stays", alpha_end=end) for end in (0.25, 0.5, 0.75)),
    _vrpo("vrpo-no-warmup", "VRPO from the first step", warmup=0),
    _vrpo("vrpo-no-trust", "no trust region", trust=0),
    Variant(
        "vrpo-irepa",
        "vrpo",
        {"align.vrpo.base": "irepa", "align.weight": "1.0"},
        "VRPO on iREPA's projector, targets and weight",
    ),
    *(
        Variant(f"{name}-weight-{weight}", name, {"align.weight": weight}, f"lambda = {weight}")
        for weight in ("0.25", "1", "1.5")
        for name in ("repa", "vrpo")
    ),
    *(
        Variant(f"{name}-noisings-{count}", name, {"train.noisings": count}, f"{count} noise levels an image")
        for count in ("2", "4")
        for name in ("repa", "vrpo")
    ),
]
VARIANTS = {variant.name: variant for variant in _TABLE}


def parse_variant(text: str) -> Variant:
    """Read NAME, or NAME:KEY=VALUE,KEY=VALUE with changes to a variant; [LABEL@] before it gives it a name of its own.

    Raises:
        ConfigError: a name that is not known, or a change that is not KEY=VALUE.
    """
    label, at, rest = text.rpartition("@")
    name, colon, changes = rest.partition(":")
    base = VARIANTS.get(name)
    if base is None:
        raise ConfigError(f"there is no variant '{name}': {nearest(name, VARIANTS)}")
    found = dict(base.changes)
    for change in changes.split(",") if colon else []:
        key, equals, value = change.strip().lstrip("-").partition("=")
        if not (key and equals and value):
            raise ConfigError(f"the variant '{text}' has '{change}': write {name}:align.vrpo.gate=False, for example.")
        found[key] = value
    return Variant(label if at else rest, base.objective, found, base.about if not colon else "")


def describe_variants() -> str:
    """Return the named variants as lines of a table."""
    rows = [(variant.name, variant.objective, variant.about) for variant in VARIANTS.values()]
    width = max(len(name) for name, *_ in rows)
    kind = max(map(len, OBJECTIVES))
    return "\n".join(f"{name:<{width}}  {objective:<{kind}}  {about}" for name, objective, about in rows)
