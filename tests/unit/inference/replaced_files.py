"""Video files that change while a command reads them."""

from pathlib import Path

from umt_hf.inference.moments import MomentReads


def replace_after_counting(monkeypatch, path: Path, content: bytes) -> None:
    """Give a file other contents as soon as its windows have been counted, as a download that goes on would."""
    count = MomentReads.count

    def count_and_replace(self, file):
        total = count(self, file)
        if file.path == str(path):
            self.close()
            path.with_name("unfinished").write_bytes(content)
            path.with_name("unfinished").replace(path)
        return total

    monkeypatch.setattr(MomentReads, "count", count_and_replace)
