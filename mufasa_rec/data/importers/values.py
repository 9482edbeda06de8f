"""Columns as sources write them to columns as we keep them: ids, times, positions, numbers, lists.

Each function takes an Arrow column and a name for messages, and returns an Arrow array of one type, nulls kept, or
refuses by name.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute
import pyarrow.types as pt

pc: Any = pyarrow.compute  # made at import: a type checker cannot see its functions

_EXACT = 2**53  # floats hold integers exactly up to here
_YEAR_1980_MS = 315_532_800_000
_YEAR_2200_MS = 7_258_118_400_000
_UNITS_PER_S = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_ZONE = re.compile(r"[T ]\d.*(?:Z|[+-]\d\d(?::?\d\d)?)$")


def flat(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """One contiguous array, dictionaries decoded."""
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    return column.dictionary_decode() if pt.is_dictionary(column.type) else column


def is_text(kind: pa.DataType) -> bool:
    """True for any string type."""
    return bool(pt.is_string(kind) or pt.is_large_string(kind))


def is_list(kind: pa.DataType) -> bool:
    """True for any list type."""
    return bool(pt.is_list(kind) or pt.is_large_list(kind) or pt.is_fixed_size_list(kind))


def id_column(column: pa.Array | pa.ChunkedArray, where: str) -> pa.Array:
    """Ids as int64 or strings.

    Whole numbers that were read as floats (a CSV column with gaps) become integers again; an empty string is null.

    Raises:
        ValueError: Fractions, infinities, numbers beyond int64, or a type that is no id.
    """
    array = flat(column)
    if is_text(array.type):
        array = array.cast(pa.large_string())
        empty = pc.equal(array, "")
        return pc.if_else(empty, pa.scalar(None, pa.large_string()), array)
    if pt.is_null(array.type):
        return array.cast(pa.int64())
    if pt.is_integer(array.type):
        try:
            return array.cast(pa.int64())
        except pa.ArrowInvalid as error:
            raise ValueError(
                f"{where}: ids are out of range ({error}); ids must fit int64, or write them as text"
            ) from error
    if pt.is_floating(array.type):
        values = array.to_numpy(zero_copy_only=False).astype(np.float64)
        known = values[~np.isnan(values)]
        wrong = known[(known != np.floor(known)) | (np.abs(known) > _EXACT)]
        if wrong.size:
            raise ValueError(
                f"{where}: {wrong.size} ids are no exact whole numbers (first: {wrong[0].item()!r}) or out of range; "
                "write ids as int64 or as text"
            )
        missing = np.isnan(values)
        return pa.array(np.where(missing, 0, values).astype(np.int64), pa.int64(), mask=missing)
    raise ValueError(f"{where}: ids of type {array.type} are not ids; write them as int64 or as text")


def number_column(column: pa.Array | pa.ChunkedArray, where: str) -> pa.Array:
    """Numbers as float64; text that is no number is refused."""
    array = flat(column)
    try:
        array = array.cast(pa.float64())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(f"{where}: of type {array.type}, must be numbers ({error}); convert the column") from error
    return pc.if_else(pc.is_nan(array), pa.scalar(None, pa.float64()), array)


def position_column(column: pa.Array | pa.ChunkedArray, where: str) -> pa.Array:
    """Positions as int64."""
    array = id_column(column, where)
    if not pt.is_integer(array.type):
        raise ValueError(f"{where}: positions are text; write them as integers")
    return array


def time_column(
    column: pa.Array | pa.ChunkedArray, where: str, unit: str = "auto", timezone: str | None = None
) -> tuple[pa.Array, str]:
    """Times as int64 milliseconds UTC.

    Args:
        column: Numbers, text in ISO 8601, or Arrow timestamps and dates.
        where: File and column, for messages.
        unit: Of numbers: ``s``, ``ms``, ``us``, ``ns``, or ``auto`` by their size.
        timezone: Zone of times written without one; of two times that a clock shows twice the earlier one is meant.

    Returns:
        The times, and in words how they were read.

    Raises:
        ValueError: Naive times without ``timezone``, text that is no time, or times before 1980 or after 2200.
    """
    array = flat(column)
    if pt.is_null(array.type) or array.null_count == len(array):
        return pa.nulls(len(array), pa.int64()), "no times at all"
    if is_text(array.type):
        array, how = _parse_text(array, where, timezone), "ISO 8601 text"
    elif pt.is_date(array.type) or pt.is_timestamp(array.type):
        array, how = array.cast(pa.timestamp("us", tz=getattr(array.type, "tz", None)), safe=False), "timestamps"
    else:
        return _numeric(array, where, unit)
    if array.type.tz is None:
        array, how = _localise(array, where, timezone), f"{how}, local to {timezone}"
    return _plausible(array.cast(pa.int64()).to_numpy(zero_copy_only=False), where, 1000), how


def _numeric(array: pa.Array, where: str, unit: str) -> tuple[pa.Array, str]:
    array = array.cast(pa.int64()) if pt.is_integer(array.type) else number_column(array, where)
    values = array.to_numpy(zero_copy_only=False)  # floats when there are nulls: then NaN
    how = f"numbers in {unit}"
    if unit in ("auto", "iso"):
        largest = np.nanmax(np.abs(values.astype(np.float64)))
        unit = "s" if largest < 1e11 else "ms" if largest < 1e14 else "us" if largest < 1e17 else "ns"
        how = f"numbers, taken for {unit} by their size"
    if unit == "s":
        return _plausible(values * 1000, where), how
    return _plausible(values, where, _UNITS_PER_S[unit] // 1000), how


def _plausible(values: np.ndarray, where: str, divisor: int = 1) -> pa.Array:
    """Milliseconds with nulls; refuses what cannot be the time of an event."""
    missing = np.isnan(values) if values.dtype.kind == "f" else np.zeros(values.size, bool)
    milliseconds = np.where(missing, 0, np.floor_divide(values, divisor)).astype(np.int64)
    known = milliseconds[~missing]
    if known.size and np.median(known) < _YEAR_1980_MS:
        day = pd.Timestamp(int(np.median(known)), unit="ms").date()
        raise ValueError(
            f"{where}: the middle time is {day}, so these are no absolute times; give "
            "--columns.time-unit if the unit is wrong, or use the column for the order only with --columns.position"
        )
    if known.size and known.max() > _YEAR_2200_MS:
        raise ValueError(f"{where}: the last time is after the year 2200; give the unit with --columns.time-unit")
    return pa.array(milliseconds, pa.int64(), mask=missing)


def _parse_text(array: pa.Array, where: str, timezone: str | None) -> pa.Array:
    text = pd.Series(array.to_pandas())
    known = text[text.notna() & (text != "")]
    zoned = known.str.contains(_ZONE)
    if zoned.any() and not zoned.all():
        raise ValueError(
            f"{where}: {int((~zoned).sum())} of {len(known)} times have no zone, the others have; write all in one way"
        )
    if not zoned.any() and timezone is None:
        _refuse_naive(where, str(known.iloc[0]))
    try:
        parsed = pd.to_datetime(text.mask(text == ""), format="ISO8601", utc=bool(zoned.all()))
    except ValueError as error:
        raise ValueError(f"{where}: not a time in ISO 8601 ({error}); convert the column") from error
    return pa.array(parsed).cast(pa.timestamp("us", tz="UTC" if zoned.all() else None), safe=False)


def _refuse_naive(where: str, example: str) -> None:
    raise ValueError(
        f"{where}: times such as {example!r} have no zone; say where they were taken with --columns.timezone "
        "(Europe/London, or UTC)"
    )


def _localise(array: pa.Array, where: str, timezone: str | None) -> pa.Array:
    if timezone is None:
        _refuse_naive(where, str(array.drop_null()[0]))
    try:
        return pc.assume_timezone(array, timezone, ambiguous="earliest", nonexistent="latest")
    except pa.ArrowInvalid as error:
        raise ValueError(
            f"{where}: --columns.timezone {timezone!r} is not known ({error}); use a name such as Europe/London"
        ) from error


def categorical_column(column: pa.Array | pa.ChunkedArray, where: str, separator: str | None = None) -> pa.Array:
    """Categories as int64 or strings, or lists of them; text with ``separator`` in it becomes a list."""
    array = flat(column)
    if is_list(array.type):
        array = array.cast(pa.large_list(array.type.value_type))
        values = categorical_column(array.values, where)
        return pa.LargeListArray.from_arrays(array.offsets, values, mask=array.is_null() if array.null_count else None)
    if is_text(array.type):
        array = array.cast(pa.large_string())
        if separator and pc.any(pc.match_substring(array, separator)).as_py():
            return pc.split_pattern(array, separator).cast(pa.large_list(pa.large_string()))
        return array
    if pt.is_integer(array.type) or pt.is_null(array.type):
        return array.cast(pa.int64())
    if pt.is_floating(array.type) or pt.is_boolean(array.type):
        return array.cast(pa.large_string())
    raise ValueError(f"{where}: categories of type {array.type} are not supported; write them as integers or text")
