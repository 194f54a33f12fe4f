"""The resource's model: where it comes from, and what keeps it."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from quire.operator.rules import Rule, Spec, each_matches, matches
from quire.operator.spec_parts import IMAGE, IMAGE_ADVICE, NAME, NAME_ADVICE, QUANTITY, RELATIVE_PATH, SecretKey


class HubModel(Spec, frozen=True):
    """A model on the Hugging Face hub. Every pod downloads it, into the cache if there is one."""

    name: Annotated[str, Meta(description="Its name on the hub, as OWNER/NAME.", min_length=3, max_length=200)]
    revision: Annotated[
        Annotated[str, Meta(min_length=1, max_length=200)] | None,
        Meta(description="A branch, tag or commit; left out, the hub's main branch, as it is when a pod downloads it."),
    ] = None
    token_secret: Annotated[SecretKey | None, Meta(description="The hub's token, for private and gated models.")] = None

    rules = (
        matches(
            "revision",
            r"\w[\w./-]*",
            "revision is no branch, tag or commit: write one as the hub shows it, such as v1.0",
        ),
        matches("name", r"\w[\w.-]*/\w[\w.-]*", "name is not a hub name: write OWNER/NAME, such as Qwen/Qwen3-8B"),
    )


class ClaimModel(Spec, frozen=True):
    """A model on a PersistentVolumeClaim in the service's namespace. It is mounted read-only in all pods."""

    name: Annotated[str, Meta(description="The claim.", min_length=1, max_length=253)]
    path: Annotated[
        str,
        Meta(description="Folder or .gguf file on the volume; empty is the volume itself.", max_length=1024),
    ] = ""

    rules = (
        matches("name", NAME, f"name is not a claim's name: use {NAME_ADVICE}"),
        matches("path", f"({RELATIVE_PATH})?", "path leaves the volume: write it relative and without '..'"),
    )


class ImageModel(Spec, frozen=True):
    """A model in an OCI image, mounted as a volume in all pods (Kubernetes 1.35 or newer)."""

    reference: Annotated[str, Meta(description="The image.", min_length=1, max_length=512)]
    path: Annotated[
        str, Meta(description="Folder or .gguf file in the image; empty is the image's root.", max_length=1024)
    ] = ""
    pull_policy: Annotated[
        Literal["Always", "IfNotPresent", "Never"], Meta(description="When nodes pull the image.")
    ] = "IfNotPresent"

    rules = (
        matches("reference", IMAGE, f"reference is not an image: {IMAGE_ADVICE}"),
        matches("path", f"({RELATIVE_PATH})?", "path leaves the image: write it relative and without '..'"),
    )


class ModelCache(Spec, frozen=True):
    """A claim that the operator makes for the hub's downloads and deletes with the service."""

    size: Annotated[str, Meta(description="Room for the model's files, such as 50Gi.", max_length=32)]
    storage_class: Annotated[
        Annotated[str, Meta(min_length=1, max_length=253)] | None,
        Meta(description="Left out, the cluster's default class."),
    ] = None
    access_mode: Annotated[
        Literal["ReadWriteMany", "ReadWriteOnce"],
        Meta(description="ReadWriteOnce only where all pods run on one node."),
    ] = "ReadWriteMany"

    rules = (
        matches("size", QUANTITY, "size is not a quantity: write a number with a unit, such as 50Gi"),
        matches("storage_class", NAME, f"storageClass is not a class's name: use {NAME_ADVICE}"),
    )


class ModelSpec(Spec, frozen=True):
    """Where the model comes from: one of hub, claim and image; none of them is the model that the images carry."""

    hub: Annotated[HubModel | None, Meta(description="A model on the Hugging Face hub.")] = None
    claim: Annotated[ClaimModel | None, Meta(description="A model on a PersistentVolumeClaim.")] = None
    image: Annotated[ImageModel | None, Meta(description="A model in an OCI image.")] = None
    cache: Annotated[
        ModelCache | None, Meta(description="Keeps the hub's downloads; without it each pod downloads anew.")
    ] = None
    served_names: Annotated[
        tuple[Annotated[str, Meta(min_length=1, max_length=200)], ...],
        Meta(description="What the API calls the model; empty is the checkpoint's own name.", max_length=16),
    ] = ()

    rules = (
        Rule(
            "[has(self.hub), has(self.claim), has(self.image)].filter(given, given).size() <= 1",
            "model has several sources: keep one of hub, claim and image",
            lambda model: sum(each is not None for each in (model.hub, model.claim, model.image)) <= 1,
        ),
        Rule(
            "!has(self.cache) || has(self.hub)",
            "model.cache keeps what is downloaded: give model.hub with it, or leave it out",
            lambda model: model.cache is None or model.hub is not None,
        ),
        each_matches(
            "served_names",
            r"[\w][-\w./:]*",
            "servedNames holds a bad name: use letters, digits, '-', '_', '.', '/', ':'",
        ),
    )
