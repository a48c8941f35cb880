package tunnel

import (
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
)

func TestClockIsReadHalfWay(t *testing.T) {
	asked := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	reply := ssh.Marshal(clockReply{uint64(asked.Add(10 * time.Second).UnixNano()), ""})
	c, ok := readClock(reply, asked, 200*time.Millisecond)
	if !ok || c.Ahead != 9900*time.Millisecond || c.Within != 100*time.Millisecond {
		t.Errorf("clock %+v, %v", c, ok)
	}
	for name, payload := range map[string][]byte{"a node that tells no time": nil, "rubbish": []byte("x"), "too long": append(reply, 0)} {
		if c, ok := readClock(payload, asked, time.Second); ok {
			t.Errorf("%s: %+v", name, c)
		}
	}
}
