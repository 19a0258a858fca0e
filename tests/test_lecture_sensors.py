"""examples/sensors.py: two sensors in one set of nodes, of which one may fail."""

import json

import pytest
import sensors
import torch


def run(folder, *given):
    return sensors.main(sensors.settings(["--runs", str(folder), "--dtype", "float32", *map(str, given)]))


def scenes(count, seed):
    return sensors.scenes(count, torch.Generator().manual_seed(seed))


def test_readings_are_as_good_as_each_sensor_is():
    given = scenes(4000, 1)
    count = len(sensors.CLASSES)
    camera, radar = given.camera[:, :count] - given.targets, given.radar[:, :count] - given.targets
    relative = (camera[..., 1] / given.targets[..., 1]).std()
    found = torch.stack([camera[..., 0].std(), relative, radar[..., 0].std(), radar[..., 1].std()])
    wanted = [sensors.CAMERA_BEARING, sensors.CAMERA_DISTANCE, sensors.RADAR_BEARING, sensors.RADAR_DISTANCE]
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=0.03, atol=0)
    counts = given.real.sum(2)
    assert counts.min() == count
    assert counts.max() == count + sensors.CLUTTER
    again = scenes(4000, 1)
    assert all(torch.equal(one, other) for one, other in zip(given, again, strict=True))


def test_places_are_to_the_right_and_ahead():
    polar = torch.tensor([[0.0, 2.0], [torch.pi / 2, 3.0], [-torch.pi / 2, 1.0]])
    torch.testing.assert_close(sensors.places(polar), torch.tensor([[0.0, 2.0], [3.0, 0.0], [-1.0, 0.0]]))


def test_what_fails_is_not_heard():
    args = sensors.settings(["--layers", "1"])
    torch.manual_seed(0)
    model, given = sensors.Fusion(args), scenes(5, 2)
    other = given._replace(radar=torch.randn_like(given.radar))
    alone = torch.tensor([True, False]).expand(5, 2)
    torch.testing.assert_close(model(given, alone), model(other, alone))
    assert not torch.allclose(model(given, ~alone), model(other, ~alone))


def test_by_hand_the_right_echo_is_found_where_there_is_one():
    given = scenes(500, 3)
    row, kept = torch.arange(500), torch.zeros_like(given.real)
    kept[:, 0] = True
    kept[row, 1, given.asked] = True  # the radar sees what is asked for and nothing else
    one, all_of_them = sensors.by_hand(given._replace(real=kept)).values()
    assert one == pytest.approx(all_of_them)
    assert one < 0.05  # 0.02 in distance, and 0.01 rad at up to 3


@pytest.mark.slow
def test_who_never_saw_a_sensor_fail_is_lost_when_it_does(tmp_path):
    found = run(tmp_path, "--quick")["found"]
    assert found["dropped"]["camera"] < 0.97 * found["both"]["camera"]
    assert found["dropped"]["both"] < 0.97 * found["dropped"]["camera"]
    folder = tmp_path / "sensors"
    assert json.loads((folder / "outcome.json").read_text())["figure"] == found["dropped"]["both"]
    left = {"config.json", "metrics.csv", "training.png", "scene.png", "errors.png", "model.safetensors"}
    assert left <= {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--graph", "Full().sized(3, 3)"), "--graph must fit any number of nodes"),
        (("--training", "lidar"), "argument --training: invalid choice: 'lidar'"),
        (("--layers", "0"), "--layers must be 1 or more"),
    ],
)
def test_bad_settings_are_named(given, message, capsys):
    with pytest.raises(SystemExit):
        sensors.settings(list(given))
    assert message in capsys.readouterr().err
