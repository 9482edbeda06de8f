"""Which column is what: named by flags or ``columns.json``, else found by its usual names; the choice is reported."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from mufasa_rec.data import paths
from mufasa_rec.data.importers.impression_columns import ImpressionsConfig
from mufasa_rec.data.manifest_json import from_json, load_json

COLUMNS_FILE = "columns.json"
T = TypeVar("T", "ColumnsConfig", ImpressionsConfig)

# Names are compared in lower case without underscores, hyphens and blanks; earlier ones are preferred.
_USER = ("user", "userid", "uid", "customer", "customerid", "visitorid", "memberid")
_ITEM = ("item", "itemid", "movieid", "productid", "articleid", "asin", "iid", "sku", "videoid", "trackid")
EVENT_SYNONYMS: dict[str, tuple[str, ...]] = {
    "user": _USER,
    "item": _ITEM,
    "time": ("timestamp", "ts", "time", "timestampms", "eventtime", "datetime", "unixtime", "createdat", "date"),
    "position": ("position", "pos", "sequence", "seq"),
    "action": ("action", "actiontype", "event", "eventtype", "behavior", "behaviour"),
    "weight": ("weight",),
    "label": ("label", "clicked", "isclick", "click"),
}
ITEM_SYNONYMS: dict[str, tuple[str, ...]] = {
    "item_id": (*_ITEM, "id"),
    "title": ("title", "name", "itemname", "productname"),
    "available_from": ("availablefrom",),
    "available_to": ("availableto",),
}
_ITEM_CATEGORICALS = ("genres", "genre", "categories", "category", "brand", "tags")


@dataclass(frozen=True, kw_only=True)
class ColumnsConfig:
    """Names of a source's columns and how to read them; what is not named is looked for under the usual names.

    Attributes:
        user: Column of the user id.
        item: Column of the item id in the events.
        time: Column of the event time.
        position: Column of the event's place within its user, when there is no time.
        action: Column of the kind of event (view, click, buy).
        weight: Column of the event's weight in the loss, at least 0.
        label: Column of a 0/1 outcome.
        label_at_least: Makes the label 1 where the column is at least this and 0 elsewhere (a rating of 4 or more).
        event_categoricals: Categorical columns of events; none unless named.
        item_id: Column of the item id in the items file.
        title: Column of the item's title.
        item_categoricals: Categorical columns of items; genres, categories, brand and list columns unless named.
        available_from: Column of the time from which an item exists.
        available_to: Column of the time until which an item exists.
        list_separator: Splits the text of a multi-valued categorical.
        time_unit: Unit of numeric times; ``auto`` tells them by their size, ``iso`` is text.
        timezone: Zone of times that are written without one, such as Europe/London; numeric times are always UTC.
        drop_items: Column of the items file to a regular expression; items where it matches the whole value are dropped
            with their events (``{"stock_code": "POST|M|DOT"}``).
        impressions: What the columns of impressions mean, for data with labels.
    """

    user: str | None = None
    item: str | None = None
    time: str | None = None
    position: str | None = None
    action: str | None = None
    weight: str | None = None
    label: str | None = None
    label_at_least: float | None = None
    event_categoricals: tuple[str, ...] | None = None
    item_id: str | None = None
    title: str | None = None
    item_categoricals: tuple[str, ...] | None = None
    available_from: str | None = None
    available_to: str | None = None
    list_separator: str = "|"
    time_unit: Literal["auto", "s", "ms", "us", "ns", "iso"] = "auto"
    timezone: str | None = None
    drop_items: dict[str, str] = field(default_factory=dict)
    impressions: ImpressionsConfig = field(default_factory=ImpressionsConfig)


def merge_columns(flags: ColumnsConfig, folder: paths.Location | None, file: str | None = None) -> ColumnsConfig:
    """Flags over ``columns.json``: a flag that was given wins over the file.

    Args:
        flags: What the command line said.
        folder: The source's folder, where ``columns.json`` is looked for; None for a single file.
        file: Another place of the JSON file; it must exist.
    """
    url = file or (paths.join(folder, COLUMNS_FILE) if folder is not None else None)
    if url is None or (file is None and not paths.exists(url)):
        return flags
    found = from_json(ColumnsConfig, load_json(url), url)
    found = dataclasses.replace(found, impressions=_given(flags.impressions, found.impressions))
    return _given(dataclasses.replace(flags, impressions=found.impressions), found)


def _given(flags: T, found: T) -> T:
    """``found`` with those fields of ``flags`` that are not their defaults."""
    default = type(flags)()
    given = {f.name: getattr(flags, f.name) for f in dataclasses.fields(flags)}
    return dataclasses.replace(found, **{k: v for k, v in given.items() if v != getattr(default, k)})


@dataclass
class Resolution:
    """The columns of one file: role to column, in words for the report."""

    where: str
    columns: dict[str, str] = field(default_factory=dict)
    categoricals: list[str] = field(default_factory=list)
    choices: list[str] = field(default_factory=list)
    ignored: dict[str, str] = field(default_factory=dict)

    def take(self, role: str, column: str, how: str) -> None:
        """Uses ``column`` for ``role`` and says so."""
        self.columns[role] = column
        self.choices.append(f"{self.where}: {role} is {column!r} ({how})")


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "").replace(" ", "")


def _resolve_roles(
    found: Resolution, config: ColumnsConfig, present: Sequence[str], synonyms: dict[str, tuple[str, ...]]
) -> None:
    plain = {_plain(name): name for name in reversed(list(present))}
    for role, names in synonyms.items():
        named = getattr(config, role)
        if named is not None:
            require_columns(found.where, present, [named], role)
            found.take(role, named, "named")
            continue
        match = next((plain[name] for name in names if name in plain), None)
        if match is not None and match not in found.columns.values():
            found.take(role, match, "by its name")


def require_columns(where: str, present: Sequence[str], wanted: Sequence[str], role: str) -> None:
    """Refuses a column that is not there, naming those that are."""
    for name in wanted:
        if name not in present:
            flag = role.replace("_", "-")
            raise ValueError(
                f"{where}: column {name!r} ({role}) is missing; the file has {', '.join(present)}; "
                f"name the right one with --columns.{flag} or in {COLUMNS_FILE}"
            )


def resolve_events(config: ColumnsConfig, present: Sequence[str], where: str) -> Resolution:
    """Finds the columns of the events file.

    Raises:
        ValueError: There is no user or item column, no time and no position, or a named column is missing.
    """
    found = Resolution(where)
    _resolve_roles(found, config, present, EVENT_SYNONYMS)
    for role in ("user", "item"):
        if role not in found.columns:
            raise ValueError(
                f"{where}: no column for the {role} id; the file has {', '.join(present)}; "
                f"name it with --columns.{role} or in {COLUMNS_FILE}"
            )
    if "time" not in found.columns and "position" not in found.columns:
        raise ValueError(
            f"{where}: no column for the time or the position of an event; the file has {', '.join(present)}; "
            f"name one with --columns.time or --columns.position, or in {COLUMNS_FILE}"
        )
    found.categoricals = list(config.event_categoricals or ())
    require_columns(where, present, found.categoricals, "event_categoricals")
    used = {*found.columns.values(), *found.categoricals}
    found.ignored = {name: "not asked for" for name in present if name not in used}
    return found


def resolve_impressions(config: ColumnsConfig, present: Sequence[str], where: str) -> Resolution:
    """Finds user, item and time in the impressions file, by the names of the events."""
    found = Resolution(where)
    _resolve_roles(found, config, present, {role: EVENT_SYNONYMS[role] for role in ("user", "item", "time")})
    for role in ("user", "item"):
        if role not in found.columns:
            raise ValueError(
                f"{where}: no column for the {role} id; the file has {', '.join(present)}; "
                f"name it with --columns.{role} or in {COLUMNS_FILE}"
            )
    return found


def resolve_items(config: ColumnsConfig, present: Sequence[str], lists: Sequence[str], where: str) -> Resolution:
    """Finds the columns of the items file; ``lists`` are the columns that hold lists."""
    found = Resolution(where)
    # A source's own name for the item in the events is the likeliest one here too.
    if config.item_id is None and config.item in present:
        config = dataclasses.replace(config, item_id=config.item)
    _resolve_roles(found, config, present, ITEM_SYNONYMS)
    if "item_id" not in found.columns:
        raise ValueError(
            f"{where}: no column for the item id; the file has {', '.join(present)}; name it with --columns.item-id"
        )
    free = [name for name in present if name not in found.columns.values()]
    if config.item_categoricals is not None:
        require_columns(where, present, config.item_categoricals, "item_categoricals")
        found.categoricals = list(config.item_categoricals)
    else:
        found.categoricals = [name for name in free if _plain(name) in _ITEM_CATEGORICALS or name in lists]
    found.choices += [f"{where}: {name!r} is a categorical" for name in found.categoricals]
    used = {*found.columns.values(), *found.categoricals}
    found.ignored = {name: "not asked for" for name in present if name not in used}
    return found
