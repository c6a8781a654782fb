"""Is a token store still what was written? Every column of every part against its checksum."""

import concurrent.futures
import dataclasses
import pathlib
import time

from data_pipelines import checksum, parts, store
from emu3_jax import metrics


@dataclasses.dataclass(frozen=True)
class Damage:
    """What is wrong with a column of a part, or with its part.json."""

    part: str
    column: str
    reason: str

    def __str__(self) -> str:
        return f"{self.part}: {self.column} {self.reason}"


@dataclasses.dataclass
class Verify:
    """Job: reads all of `store`, `threads` columns at a time, and names all that is damaged.

    A column of a part is held in memory about three times over while it is checked.
    """

    store: str = ""
    threads: int = 4

    def run(self) -> None:
        """Prints a line for each damage; then raises StoreError if there was any."""
        if not self.store:
            raise ValueError("give --config.store=DIR")
        if self.threads < 1:
            raise ValueError(f"threads is {self.threads}; take at least 1")
        damages = self.damages()
        bad = sorted({damage.part for damage in damages})
        if bad:
            some = ", ".join(bad[:3]) + (", ..." if len(bad) > 3 else "")
            raise store.StoreError(
                f"store {self.store}: {len(damages)} damaged columns in {len(bad)} parts ({some}); "
                "remove these parts and run its encode job again"
            )
        print(f"{self.store}: {store.Store(self.store).info['parts']} parts, all as written")

    def damages(self) -> list[Damage]:
        """All damages, each printed when it is found; StoreError if there is no store."""
        info = store.read_info(self.store)
        damages, columns = [], []
        for part in range(info["parts"]):
            path = store.part_path(self.store, part, info["parts"])
            found, sizes = _sizes(path)
            damages += found
            columns += [(path, column, size) for column, size in sizes.items()]
        for damage in damages:
            print(damage, flush=True)
        progress = _Progress(self.store, sum(size for _, _, size in columns))
        with concurrent.futures.ThreadPoolExecutor(self.threads) as pool:
            jobs = {pool.submit(_read, path, column): size for path, column, size in columns}
            for job in concurrent.futures.as_completed(jobs):
                if job.result() is not None:
                    damages.append(job.result())
                    print(job.result(), flush=True)
                progress.add(jobs[job])
        return damages


def _sizes(path: pathlib.Path) -> tuple[list[Damage], dict[str, int]]:
    """What a part's files show without being read, and the bytes of each column worth reading."""
    try:
        info = parts.read_part(path)
    except store.StoreError as error:
        return [Damage(path.name, "part.json", str(error))], {}
    if info is None:
        return [Damage(path.name, "part.json", "is missing")], {}
    damages, sizes = {}, dict.fromkeys(info["crc32c"], 0)
    for name, size in info["files"].items():
        column = name.partition("/")[0]
        found = (path / name).stat().st_size if (path / name).exists() else 0
        if found != size:
            damages[column] = Damage(path.name, column, f"has {found} bytes of {size} in {name}")
        sizes[column] += size
    whole = {column: size for column, size in sizes.items() if column not in damages}
    return list(damages.values()), whole


def _read(path: pathlib.Path, column: str) -> Damage | None:
    """Reads a column; what is wrong with it, if anything."""
    info = parts.read_part(path)
    try:
        values_E = parts.open_column(path, info, column).read().result()
    except ValueError as error:
        return Damage(path.name, column, f"cannot be read: {parts.first_line(error)}")
    found = f"{checksum.crc32c(values_E):08x}"
    if found != info["crc32c"][column]:
        wanted = info["crc32c"][column]
        return Damage(path.name, column, f"has crc32c {found}, part.json says {wanted}")
    return None


class _Progress:
    """A line every few seconds, and a last one: bytes done, rate, time left."""

    def __init__(self, name: str, total: int):
        self._name, self._total, self._done = name, total, 0
        self._start = self._shown = time.time()

    def add(self, size: int) -> None:
        """Counts a column that is done."""
        self._done += size
        now = time.time()
        if now - self._shown < 5 and self._done < self._total:
            return
        self._shown = now
        rate = self._done / max(now - self._start, 1e-9)
        left = metrics.time_left((self._total - self._done) / max(rate, 1))
        print(
            f"{self._name}  {self._done / 1e6:,.1f}/{self._total / 1e6:,.1f} MB read  "
            f"{rate / 1e6:,.0f} MB/s  {left} left",
            flush=True,
        )
