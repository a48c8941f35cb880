package e2e

import (
	"testing"

	"mailproxy/test/lab"
)

// A sink is a receiving mail server that keeps what it took, by Subject.
type sink struct{ *lab.Sink }

// newSink reserves an address for a sink; nobody answers there before listen.
func newSink() sink { return sink{lab.NewSink()} }

// listen takes mail until the test ends.
func (s sink) listen(t testing.TB) {
	t.Helper()
	stop, err := s.Listen()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
}

// A refusal is a reply that is not the wanted one.
type refusal = lab.RefusalError

// send gives one message with a subject to the node over SMTP and gives the last reply, or a *refusal. filler is how many octets of
// body it has besides.
func (n *node) send(to, subject string, filler int) (string, error) {
	return n.Send(to, subject, filler)
}

// mustSend wants the message to be taken.
func (n *node) mustSend(to, subject string) {
	n.t.Helper()
	if _, err := n.send(to, subject, 0); err != nil {
		n.t.Errorf("%s takes no mail: %v", n.name, err)
	}
}

// takes waits until the node accepts mail for an address: then it has the configuration that says so.
func (n *node) takes(to string) {
	n.t.Helper()
	n.eventually(func() error { _, err := n.send(to, "probe", 0); return err })
}
