"""What is shown of an example that takes long."""

from macbench import progress


def test_a_long_generation_is_seen_to_go_on(monkeypatch):
    """The bar moves once per example; tokens of one that takes long are shown as they come, but not each of them."""
    now, shown = [0.0], []

    class Bar:
        def set_postfix_str(self, text, refresh):
            shown.extend([text] * refresh)

    monkeypatch.setattr(progress, "time", lambda: now[0])
    more = progress.rate(Bar(), "mac")
    for _ in range(1000):
        now[0] += 0.01
        more(1)
    assert 8 <= len(shown) <= 12 and shown[0].startswith("mac 1 tok") and shown[-1].endswith("100 tok/s")
