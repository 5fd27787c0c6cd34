"""Rows of lists as Arrow columns, a chunk at a time: paths that start at a root, and types that fit each other."""

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from ...processing.media_files import URL_START
from .paths import HOME, join_root

# With more, Python's garbage collector walks over the lists and dictionaries of a chunk so often that time doubles.
CHUNK_ROWS = 1024
VIDEO = "video"
Item = TypeVar("Item")


class MixedKindsError(ValueError):
    """Values of a column do not fit each other."""


def split_chunks(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Items in lists of `CHUNK_ROWS`."""
    iterator = iter(items)
    while chunk := list(islice(iterator, CHUNK_ROWS)):
        yield chunk


def join_paths(root: str, paths: pa.Array) -> pa.Array:
    """`join_root` of a column of texts; what is null stays null."""
    if os.sep != "/" or call("any", call("starts_with", paths, pattern=HOME)).as_py():
        return pa.array([path and join_root(root, path) for path in paths.to_pylist()], pa.string())
    prefix = root if not root or root.endswith("/") else f"{root}/"
    is_url = call("match_substring_regex", paths, pattern=f"(?i)^{URL_START.pattern}")
    stays = call("or", is_url, call("starts_with", paths, pattern="/"))
    joined = call("binary_join_element_wise", pa.scalar(prefix), paths, pa.scalar(""))
    return call("if_else", stays, paths, joined)


def call(name: str, *arguments: Any, **options: Any) -> Any:
    """A function of `pyarrow.compute` by name; the options are those of its class of options."""
    function: Any = getattr(pc, name + "_" if name in ("or", "and") else name)
    return function(*arguments, **options)


def unify_schemas(source: str, schemas: Sequence[pa.Schema]) -> pa.Schema:
    """One schema for chunks of a list: a column that some of them lack is null there.

    Args:
        source: The list, for errors.
        schemas: Of the chunks.

    Raises:
        ValueError: If a column has values of several kinds.
    """
    types: dict[str, pa.DataType] = {}
    for schema in schemas:
        for field in schema:
            try:
                types[field.name] = unify_types(types.get(field.name, pa.null()), field.type)
            except MixedKindsError as error:
                raise ValueError(describe_mixed(source, f"{field.name}: {error}")) from error
    return pa.schema(list(types.items()))


def describe_mixed(source: str, reason: Any) -> str:
    """The sentence about a key that no table can hold."""
    return f"{source}: a key has values of several kinds, or one that no table holds ({reason}). Use one kind."


def unify_types(first: pa.DataType, second: pa.DataType) -> pa.DataType:
    """The type that holds values of both; a single value fits among lists as a list of one.

    Raises:
        MixedKindsError: If there is none.
    """
    if first == second or pa.types.is_null(second):
        return first
    if pa.types.is_null(first):
        return second
    if pa.types.is_list(first) or pa.types.is_list(second):
        inner = [kind.value_type if pa.types.is_list(kind) else kind for kind in (first, second)]
        return pa.list_(unify_types(inner[0], inner[1]))
    if pa.types.is_struct(first) and pa.types.is_struct(second):
        return pa.struct(list(unify_schemas("", [pa.schema(list(kind)) for kind in (first, second)])))
    numbers = {pa.int64(), pa.float64()}
    if {first, second} == numbers:
        return pa.float64()
    raise MixedKindsError(f"{first} and {second}")


def fit_table(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """A chunk with the columns and types of `schema`, which `unify_schemas` gave."""
    columns = []
    for field in schema:
        has = field.name in table.column_names
        columns.append(fit_column(table.column(field.name) if has else pa.nulls(len(table)), field.type))
    return pa.Table.from_arrays(columns, schema=schema)


def fit_column(column: Any, kind: pa.DataType) -> Any:
    """A column in another type that holds its values."""
    if column.type == kind:
        return column
    if pa.types.is_null(column.type):
        return pa.nulls(len(column), kind)
    return pa.array([_fit_value(value, kind) for value in column.to_pylist()], kind)


def _fit_value(value: Any, kind: pa.DataType) -> Any:
    if value is None or not pa.types.is_list(kind):
        return value
    values = value if isinstance(value, list) else [value]
    return [_fit_value(item, kind.value_type) for item in values]
