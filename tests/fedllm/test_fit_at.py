"""Where clients have their codec from: the server's copy, or a fit of their own; what travels, and what is refused."""

import pytest
import torch

from dr_encoder.codecs.linear import LinearCodec
from fedllm import codec_fit, federation, run
from fedllm.codec_fit import Announcement
from fedllm.errors import RunStopped, UserError
from fedllm.federation import Federation
from fedllm.privacy.ledger import read_ledger
from fedllm.privacy.noise import Noise
from fedllm.sums import Sums
from fedllm.transports import simulation
from tests.fedllm.runs import AUTOENCODER, SETTINGS, USERS, Killed, adapter_of

pytestmark = pytest.mark.usefixtures("one_thread")

ADAPTER = 4 * 224 + 72  # safetensors with one entry
WARNING = "warning: the codec that clients fitted is not the server's"


def downlinks(results):
    return [record["downlink_bytes_per_client"] for record in results["history"][1:]]


def another(config, layout, rows, announced):
    """A fit on other arithmetic: a bit of one public gradient differs."""
    fit = rows.fit.clone()
    fit[0, 0] += 1e-3
    return codec_fit.client_fit(config, layout, type(rows)(fit, rows.held_out), announced)


def test_the_servers_codec_counts_as_downlink(configured, tmp_path, no_plot):
    results = run.train(configured("run", *SETTINGS["public"]))
    (file,) = (tmp_path / "run" / "checkpoints").glob("codec-*.safetensors")
    assert results["codec_bytes"] == file.stat().st_size > 8 * 4 * results["parameters"]
    assert downlinks(results) == [ADAPTER + results["codec_bytes"]] * 3
    assert results["downlink_bytes_per_client_round"] == ADAPTER + results["codec_bytes"]


def test_users_clients_take_part_in_every_round_and_fetch_each_codec_once(configured, no_plot):
    results = run.train(configured("run", *USERS, "codec.refresh=2", "federation.rounds=3"))
    with_codec = ADAPTER + results["codec_bytes"]
    assert downlinks(results) == [with_codec, ADAPTER, with_codec]
    assert results["downlink_bytes_per_client_round"] == round((2 * with_codec + ADAPTER) / 3)


def test_clients_that_fit_their_own_codec_fetch_the_adapter_alone(configured, reference, tmp_path, capfd):
    adapter, results, _ = reference("public")
    own_adapter, own, _ = reference("client fit")
    assert own_adapter == adapter and own["loss"] == results["loss"]
    assert downlinks(own) == [ADAPTER] * 3 and own["downlink_bytes_per_client_round"] == ADAPTER
    assert own["codec_bytes"] == results["codec_bytes"] and WARNING not in capfd.readouterr().err


@pytest.mark.parametrize(
    "overrides",
    [[], ["codec.prior=public+random"], AUTOENCODER, ["codec.family=kronecker"], ["codec.family=sketch"], ["method=fedit"]],
)
def test_every_family_fits_alike_on_both_sides(overrides, configured, no_plot):
    results = run.train(configured("run", "codec.fit_at=client", *overrides))
    assert results["downlink_bytes_per_client_round"] == ADAPTER


def test_the_clients_fit_is_a_second_one_and_they_encode_with_it(configured, monkeypatch, no_plot):
    fits, real = [], codec_fit._fit
    monkeypatch.setattr(codec_fit, "_fit", lambda *args: fits.append(real(*args)) or fits[-1])
    encoded_by, encode = [], LinearCodec.encode
    monkeypatch.setattr(LinearCodec, "encode", lambda self, updates: encoded_by.append(self) or encode(self, updates))
    run.train(configured("run", *SETTINGS["client fit"]))
    assert len(fits) == 4  # two codecs, each on both sides
    servers, clients = fits[::2], fits[1::2]
    assert [codec.fingerprint() for codec in servers] == [codec.fingerprint() for codec in clients]
    assert all(codec in encoded_by for codec in clients)
    assert sum(codec in servers for codec in encoded_by) == 2  # for the clip norm, once a refit


def test_a_fit_that_differs_gives_way_to_the_servers_copy_which_counts(configured, reference, tmp_path, monkeypatch, capfd):
    adapter, _, _ = reference("public")
    monkeypatch.setattr(simulation, "client_fit", another)
    results = run.train(configured("run", *SETTINGS["client fit"]))
    assert adapter_of(tmp_path / "run") == adapter  # not the clients' own: it would be decoded as something else
    assert downlinks(results) == [ADAPTER + results["codec_bytes"]] * 3
    assert capfd.readouterr().err.count(WARNING) == 1


def test_the_figure_follows_what_happened(configured, monkeypatch, no_plot):
    """The first codec differs, the second does not."""
    real = simulation.client_fit
    monkeypatch.setattr(simulation, "client_fit", lambda *args: (another if args[-1].round == 0 else real)(*args))
    results = run.train(configured("run", *SETTINGS["client fit"]))
    with_codec = ADAPTER + results["codec_bytes"]
    assert downlinks(results) == [with_codec, with_codec, ADAPTER]
    assert results["downlink_bytes_per_client_round"] == round((2 * with_codec + ADAPTER) / 3)


def test_what_clients_fetched_is_known_after_a_restart(configured, kill_at, monkeypatch, tmp_path, no_plot):
    monkeypatch.setattr(simulation, "client_fit", another)
    disarm = kill_at(federation, "noisy_mean", 2, True)
    with pytest.raises(Killed):
        run.train(configured("run", *SETTINGS["client fit"]))
    disarm()
    results = run.resume(tmp_path / "run")
    assert downlinks(results) == [ADAPTER + results["codec_bytes"]] * 3


def test_no_copy_that_is_as_announced_ends_the_run_before_anything_is_sent(configured, monkeypatch, tmp_path, no_plot):
    real = Federation.hand_over

    def torn(self, announced, rows):
        self.codec = another(self.config, self.engine.layout, rows, announced)
        real(self, announced, rows)

    monkeypatch.setattr(Federation, "hand_over", torn)
    for fit_at in ("server", "client"):
        monkeypatch.setattr(simulation, "client_fit", another)
        with pytest.raises(RunStopped, match=r"^codec \w{16}: expected \w{16}, the one that the server announced; nothing was sent$"):
            run.train(configured(fit_at, f"codec.fit_at={fit_at}"))
        assert read_ledger(tmp_path / fit_at / "ledger.jsonl")[1] == []


def test_clients_do_not_encode_for_another_codec_than_theirs(configured, monkeypatch, no_plot):
    real = Sums.stage2
    monkeypatch.setattr(Sums, "stage2", lambda self, *what: _renamed(real(self, *what)))
    monkeypatch.setattr(Noise, "sample_cohort", lambda *args, **key: pytest.fail("a cohort was drawn"))
    with pytest.raises(RunStopped, match=r"expected 0{16}, the one that the server announced; nothing was sent"):
        run.train(configured())


def _renamed(spec):
    return type(spec)(**vars(spec) | {"codec": "0" * 16})


@pytest.mark.parametrize("damage", ["cut", "another", "gone"])
def test_a_damaged_codec_is_not_resumed_with(damage, configured, kill_at, tmp_path, no_plot):
    disarm = kill_at(federation, "noisy_mean", 2, True)
    with pytest.raises(Killed):
        run.train(configured("run", *SETTINGS["client fit"]))
    disarm()
    (file,) = (tmp_path / "run" / "checkpoints").glob("codec-*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    {"cut": lambda: file.write_bytes(data[:-9]), "another": lambda: file.write_bytes(data), "gone": file.unlink}[damage]()
    spent = len(read_ledger(tmp_path / "run" / "ledger.jsonl")[1])
    with pytest.raises(UserError, match="damaged codec"):
        run.resume(tmp_path / "run")
    assert len(read_ledger(tmp_path / "run" / "ledger.jsonl")[1]) == spent


def test_a_client_needs_nothing_but_the_announcement_and_public_gradients(configured):
    """The same fit from the same public things in another process would be this call."""
    from fedllm import public
    from fedllm.setting import build

    config = configured()
    one, other = build(config, 3), build(config, 3)
    announced = Announcement("", 0, 8, 0.0, 3)
    fits = [codec_fit.client_fit(config, each.engine.layout, public.gradients(each, config, 3, 0), announced) for each in (one, other)]
    assert torch.equal(fits[0].basis, fits[1].basis) and fits[0].fingerprint() == fits[1].fingerprint()
