package relay

import (
	"testing"

	"mailproxy/mail"
)

// A hop is told what the sender wants to hear where it offers DSN; where it does not, the Result says so.
func TestDSNParametersGoToWhoOffersDSN(t *testing.T) {
	s := newScript(t, `
S: 220 hop ready
C: EHLO test.example
S: 250-hop\r\n250-PIPELINING\r\n250-SIZE\r\n250 DSN
C: MAIL FROM:<from@a.test> SIZE=3 RET=HDRS ENVID=a+2Bb
C: RCPT TO:<x@b.test> NOTIFY=SUCCESS,DELAY ORCPT=utf-8;\x{FC}@b.test
C: RCPT TO:<y@b.test>
C: DATA
S: 250 ok\r\n250 ok\r\n250 ok\r\n354 go on
C~ .
S: 250 taken
`, `
S: 220 hop ready
C: EHLO test.example
S: 250-hop\r\n250-PIPELINING\r\n250 SIZE
C: MAIL FROM:<from@a.test> SIZE=3
C: RCPT TO:<x@b.test>
C: RCPT TO:<y@b.test>
C: DATA
S: 250 ok\r\n250 ok\r\n250 ok\r\n354 go on
C~ .
S: 250 taken
`)
	for _, offers := range []bool{true, false} {
		c := testClient(t, nil)
		a := attempt(s.addr(), "x\r\n", "x@b.test", "y@b.test")
		a.Envelope.Return, a.Envelope.EnvID = mail.ReturnHeader, "a+b"
		a.Params = []mail.RcptParams{{Notify: mail.NotifyDelay | mail.NotifySuccess, Original: "utf-8;ü@b.test"}, {Unverified: true}}
		results, err := c.Deliver(bg(), a)
		if err != nil || len(results) != 2 || results[0].DSN != offers || results[1].DSN != offers || !results[0].Reply.Positive() {
			t.Errorf("offered %v: %+v, %v", offers, results, err)
		}
		c.Close()
	}
	s.stop()
}
