"""Synthetic text: arithmetic and JSON documents from a seed, in any amount.

Both are meant to be *mostly* learnable by a small model: operands are small and results exact, and
records follow fixed schemas whose fields depend on one another (a total is price times quantity, a
city has one country). What a model got right here and loses when it is quantized is then a fact
about quantization.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any


def arithmetic_documents(seed: int, characters: int) -> list[str]:
    """Documents of 12 to 30 lines, each line one exercise with its answer.

    Args:
      seed: fixes the text; different seeds give unseen documents.
      characters: stop after this many characters.
    """
    return _until(characters, _arithmetic(random.Random(f"arithmetic-{seed}")))


def json_documents(seed: int, characters: int) -> list[str]:
    """Documents of one JSON value each: an object or a list of objects of one schema.

    Args:
      seed: fixes the text; different seeds give unseen documents.
      characters: stop after this many characters.
    """
    return _until(characters, _json(random.Random(f"json-{seed}")))


def _until(characters: int, documents: Iterator[str]) -> list[str]:
    taken: list[str] = []
    total = 0
    for document in documents:
        taken.append(document)
        total += len(document)
        if total >= characters:
            return taken
    return taken


def _arithmetic(rng: random.Random) -> Iterator[str]:
    kinds: list[Callable[[random.Random], str]] = [
        _sum, _sum, _difference, _product, _quotient, _comparison, _sequence, _parity, _chain,
    ]  # fmt: skip
    while True:
        # Half of the documents stay with one kind of exercise, so that the context tells which.
        chosen = [rng.choice(kinds)] if rng.random() < 0.5 else kinds
        lines = [rng.choice(chosen)(rng) for _ in range(rng.randint(12, 30))]
        yield "\n".join(lines) + "\n"


def _sum(rng: random.Random) -> str:
    high = rng.choice((10, 20, 100))
    a, b = rng.randrange(high), rng.randrange(high)
    return f"{a} + {b} = {a + b}"


def _difference(rng: random.Random) -> str:
    high = rng.choice((10, 20, 100))
    a, b = rng.randrange(high), rng.randrange(high)
    return f"{a} - {b} = {a - b}"


def _product(rng: random.Random) -> str:
    a, b = rng.randrange(13), rng.randrange(13)
    return f"{a} * {b} = {a * b}"


def _quotient(rng: random.Random) -> str:
    b, q = rng.randrange(1, 13), rng.randrange(13)
    return f"{b * q} / {b} = {q}"


def _comparison(rng: random.Random) -> str:
    a, b = rng.randrange(100), rng.randrange(100)
    sign = "<" if a < b else ">" if a > b else "="
    return f"{a} {sign} {b}"


def _sequence(rng: random.Random) -> str:
    start, step = rng.randrange(50), rng.randrange(1, 11)
    return "count by {}: {}".format(step, ", ".join(str(start + step * i) for i in range(7)))


def _parity(rng: random.Random) -> str:
    a = rng.randrange(1000)
    return f"{a} is {'even' if a % 2 == 0 else 'odd'}"


def _chain(rng: random.Random) -> str:
    a, b, c = (rng.randrange(10) for _ in range(3))
    return f"{a} + {b} + {c} = {a + b} + {c} = {a + b + c}"


# fmt: off
_FIRST = (
    "ada", "boris", "chloe", "dmitri", "elena", "farid", "grace", "hugo", "ines", "jonas",
    "keiko", "liam", "maria", "nadia", "omar", "petra", "quinn", "rosa", "sven", "tara",
)
_LAST = (
    "abbott", "brandt", "castro", "dubois", "eriksen", "fischer", "garcia", "haddad",
    "ivanov", "jensen", "kimura", "larsen", "moreau", "novak", "okafor", "petrov",
)
_CITIES = (
    ("Paris", "FR", "EUR"), ("Lyon", "FR", "EUR"), ("Berlin", "DE", "EUR"),
    ("Hamburg", "DE", "EUR"), ("Oslo", "NO", "NOK"), ("Tokyo", "JP", "JPY"),
    ("Osaka", "JP", "JPY"), ("Boston", "US", "USD"), ("Chicago", "US", "USD"),
    ("Lagos", "NG", "NGN"), ("Madrid", "ES", "EUR"), ("London", "GB", "GBP"),
)
_PRODUCTS = (
    ("pencil", 2), ("notebook", 5), ("lamp", 30), ("chair", 45), ("desk", 120),
    ("monitor", 200), ("keyboard", 40), ("mouse", 20), ("cable", 8), ("mug", 6),
)
# fmt: on


def _json(rng: random.Random) -> Iterator[str]:
    schemas: list[Callable[[random.Random, int], Any]] = [_user, _order, _reading, _event]
    while True:
        schema = rng.choice(schemas)
        first = rng.randrange(1, 900)
        if rng.random() < 0.5:
            value = [schema(rng, first + i) for i in range(rng.randint(2, 5))]
        else:
            value = schema(rng, first)
        indent = 2 if rng.random() < 0.6 else None
        yield json.dumps(value, indent=indent) + "\n"


def _user(rng: random.Random, number: int) -> dict[str, Any]:
    first, last = rng.choice(_FIRST), rng.choice(_LAST)
    city, country, _ = rng.choice(_CITIES)
    age = rng.randrange(16, 80)
    return {
        "id": number,
        "name": f"{first.title()} {last.title()}",
        "email": f"{first}.{last}@example.{country.lower()}",
        "age": age,
        "adult": age >= 18,
        "address": {"city": city, "country": country},
        "roles": sorted(rng.sample(("admin", "editor", "guest", "owner"), rng.randint(1, 3))),
    }


def _order(rng: random.Random, number: int) -> dict[str, Any]:
    city, country, currency = rng.choice(_CITIES)
    items = []
    for name, price in rng.sample(_PRODUCTS, rng.randint(1, 3)):
        quantity = rng.randrange(1, 5)
        items.append(
            {"product": name, "price": price, "quantity": quantity, "total": price * quantity}
        )
    return {
        "order": number,
        "customer": rng.choice(_FIRST).title(),
        "items": items,
        "count": len(items),
        "total": sum(item["total"] for item in items),
        "currency": currency,
        "ship_to": {"city": city, "country": country},
    }


def _reading(rng: random.Random, number: int) -> dict[str, Any]:
    celsius = rng.randrange(-10, 40)
    battery = rng.choice(("full", "half", "low"))
    month, day, hour = rng.randrange(1, 13), rng.randrange(1, 29), rng.randrange(24)
    return {
        "sensor": f"s{number:03d}",
        "celsius": celsius,
        "freezing": celsius <= 0,
        "battery": battery,
        "at": f"2024-{month:02d}-{day:02d}T{hour:02d}:00:00Z",
    }


def _event(rng: random.Random, number: int) -> dict[str, Any]:
    code, text, level = rng.choice(
        ((200, "ok", "info"), (301, "moved", "info"), (404, "not found", "warning"),
         (403, "forbidden", "warning"), (500, "server error", "error"))
    )  # fmt: skip
    return {
        "event": number,
        "level": level,
        "status": {"code": code, "text": text},
        "method": rng.choice(("GET", "POST", "PUT", "DELETE")),
        "path": "/" + "/".join(rng.sample(("api", "users", "orders", "items", "login"), 2)),
        "retry": level == "error",
    }
