"""A release's bill of materials in CycloneDX.

Enters: a release's record and those above it. Leaves: JSON: the model with its files' digests, its data, its software.
Refuses: nothing; what the records do not state is left out, never guessed.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import DisjunctiveLicense
from cyclonedx.output import make_outputter
from cyclonedx.schema import OutputFormat, SchemaVersion

from fmops.store import Record

_NAMESPACE = uuid.UUID("6ba7b811-9dad-11d1-80b4-00c04fd430c8")  # RFC 9562's for URLs


def bill_of_materials(release: Record, above: Sequence[Record]) -> str:
    """CycloneDX 1.6 JSON; equal records give equal text.

    Args:
        release: the release's record.
        above: the records of every artifact that it was made from.
    """
    bom = Bom(serial_number=uuid.uuid5(_NAMESPACE, release.fingerprint))
    base = release.config.get("base")
    model = Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        name=str(release.artifact["name"]),
        version=release.fingerprint[:16],
        bom_ref=release.key,
        licenses=_licences(release.artifact.get("licence")),
        components=_files(release),
        properties=[Property(name="fmops:base", value=str(base))] if base else [],
    )
    bom.metadata.component = model
    # The time of making is in the record; here it would make equal bills differ.
    bom.metadata.timestamp = None  # type: ignore[assignment]
    parts = [*_data(release), *_artifacts(above), *_software(release)]
    for part in parts:
        bom.components.add(part)
    bom.register_dependency(model, parts)
    return make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6).output_as_string(indent=1) + "\n"


def _files(release: Record) -> list[Component]:
    return [
        Component(type=ComponentType.FILE, name=name, bom_ref=f"{release.key}/{name}", hashes=[_sha256(entry.sha256)])
        for name, entry in sorted(release.files.items())
    ]


def _data(release: Record) -> list[Component]:
    """Each source that the spec names, with its stated licence."""
    return [
        Component(
            type=ComponentType.DATA,
            name=key,
            bom_ref=f"data/{key}",
            licenses=_licences(origin.get("licence")),
            properties=[Property(name="fmops:source", value=uri) for uri in origin["source"]],
        )
        for key, origin in sorted(release.config.get("data", {}).items())
    ]


def _artifacts(above: Sequence[Record]) -> list[Component]:
    kinds = {"checkpoint": ComponentType.MACHINE_LEARNING_MODEL}
    return [
        Component(
            type=kinds.get(record.kind, ComponentType.DATA),
            name=record.node,
            version=record.fingerprint[:16],
            bom_ref=record.key,
            hashes=[_sha256(record.digest)],
            properties=[Property(name="fmops:kind", value=record.kind)],
        )
        for record in sorted(above, key=lambda record: record.key)
    ]


def _software(release: Record) -> list[Component]:
    packages = release.environment.get("packages", {})
    return [
        Component(type=ComponentType.LIBRARY, name=name, version=str(version), bom_ref=f"pkg:pypi/{name}@{version}")
        for name, version in sorted(packages.items())
    ]


def _licences(stated: str | None) -> list[DisjunctiveLicense]:
    return [DisjunctiveLicense(name=stated)] if stated else []


def _sha256(digest: str) -> HashType:
    return HashType(alg=HashAlgorithm.SHA_256, content=digest)
