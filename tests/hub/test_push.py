from phi_mm.hub import Destination, push


def test_push(exported, login, loopback):
    folder, answered = exported
    login(loopback.token("ann"))
    pushed = push(folder, Destination("first"))
    assert pushed.repo == "ann/first"
    print([(s.method, s.path, s.host, s.token_sent) for s in loopback.seen])
