"""The host's side of following a log."""

from launch.host import log, stream


def test_what_a_supervisor_writes_just_before_it_ends_is_sent_before_the_last_status(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(stream, "_renew_lease", lambda folder, gone: None)
    writer, frames = log.Log(tmp_path / "log"), []

    def ends_now():
        if not frames:
            writer.write(b"last line\n")
        return False

    request = {"offset": 0, "tail": log.checksum(b"")}
    stream.stream_log(tmp_path, request, ends_now, lambda *frame: frames.append(frame))
    data, [status] = frames
    assert data == ({"at": 0, "bytes": 10}, b"last line\n")
    assert status == {"status": {}, "alive": False, "known": False}
