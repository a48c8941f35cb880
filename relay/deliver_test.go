package relay

import (
	"errors"
	"strings"
	"testing"

	"mailproxy/mail"
)

func TestDeliverDialogs(t *testing.T) {
	for _, tt := range []struct {
		name, dialog, body string
		to                 []string
		want               string
	}{
		{"one recipient in one burst, body and dot behind", hello + `
C: MAIL FROM:<from@a.test> SIZE=7
C: RCPT TO:<x@b.test>
C: DATA
S: 250 2.1.0 ok
S: 250 2.1.5 ok
S: 354 go
C: hello
C: .
S: 250 2.0.0 taken as 1`, "hello\r\n", []string{"x@b.test"}, "dot 250 2.0.0 taken as 1"},
		{"without PIPELINING each command waits", helloPlain + `
C: MAIL FROM:<from@a.test>
S: 250 ok
C: RCPT TO:<x@b.test>
S: 550 5.1.1 no
C: RCPT TO:<y@b.test>
S: 250 ok
C: DATA
S: 354 go
C: hello
C: .
S: 451 4.7.1 later`, "hello\r\n", []string{"x@b.test", "y@b.test"}, "rcpt 550 5.1.1 no\ndot 451 4.7.1 later"},
		{"all refused, DATA refused", hello + `
C: MAIL FROM:<from@a.test> SIZE=7
C: RCPT TO:<x@b.test>
C: RCPT TO:<y@b.test>
C: DATA
S: 250 ok
S: 550 5.1.1 no x
S: 550 5.1.1 no y
S: 554 5.5.1 no valid recipients`, "hello\r\n", []string{"x@b.test", "y@b.test"}, "rcpt 550 5.1.1 no x\nrcpt 550 5.1.1 no y"},
		{"all refused, DATA let through: a lone dot", hello + `
C: MAIL FROM:<from@a.test> SIZE=7
C: RCPT TO:<x@b.test>
C: DATA
S: 250 ok
S: 550 5.1.1 no x
S: 354 go
C: .
S: 250 ok`, "hello\r\n", []string{"x@b.test"}, "rcpt 550 5.1.1 no x"},
		{"MAIL refused: its reply, whatever RCPT says", hello + `
C: MAIL FROM:<from@a.test> SIZE=7
C: RCPT TO:<x@b.test>
C: DATA
S: 552 5.3.4 too big
S: 503 5.5.1 need MAIL
S: 503 5.5.1 need RCPT`, "hello\r\n", []string{"x@b.test"}, "mail 552 5.3.4 too big"},
		{"DATA refused: for those accepted", hello + `
C: MAIL FROM:<from@a.test> SIZE=7
C: RCPT TO:<x@b.test>
C: RCPT TO:<y@b.test>
C: DATA
S: 250 ok
S: 550 5.1.1 no x
S: 250 ok
S: 451 4.3.0 not now`, "hello\r\n", []string{"x@b.test", "y@b.test"}, "rcpt 550 5.1.1 no x\ndata 451 4.3.0 not now"},
		{"HELO where EHLO is refused", `
S: 220 old
C: EHLO test.example
S: 502 what
C: HELO test.example
S: 250 old
C: MAIL FROM:<from@a.test>
S: 250 ok
C: RCPT TO:<x@b.test>
S: 250 ok
C: DATA
S: 354 go
C: hello
C: .
S: 250 taken`, "hello\r\n", []string{"x@b.test"}, "dot 250 taken"},
		{"421 to MAIL comes as 451", hello + `
C: MAIL FROM:<from@a.test> SIZE=7
C: RCPT TO:<x@b.test>
C: DATA
S: 421 4.3.2 going down
close`, "hello\r\n", []string{"x@b.test"}, "mail 451 4.3.2 going down"},
		{"421 to the second RCPT ends the transaction for all but the refused", hello + `
C: MAIL FROM:<from@a.test> SIZE=7
C: RCPT TO:<x@b.test>
C: RCPT TO:<y@b.test>
C: RCPT TO:<z@b.test>
C: DATA
S: 250 ok
S: 550 5.1.1 no x
S: 250 ok
S: 421 4.3.2 going down
close`, "hello\r\n", []string{"x@b.test", "y@b.test", "z@b.test"},
			"rcpt 550 5.1.1 no x\nrcpt 451 4.3.2 going down\nrcpt 451 4.3.2 going down"},
		{"421 to the dot comes as 451", hello + `
C: MAIL FROM:<from@a.test> SIZE=7
C: RCPT TO:<x@b.test>
C: DATA
S: 250 ok
S: 250 ok
S: 354 go
C: hello
C: .
S: 421 4.3.2 going down`, "hello\r\n", []string{"x@b.test"}, "dot 451 4.3.2 going down"},
		{"dots at line starts, no line end at the end", hello + `
C: MAIL FROM:<from@a.test> SIZE=19
C: RCPT TO:<x@b.test>
C: DATA
S: 250 ok
S: 250 ok
S: 354 go
C: ..
C: ..a
C: b.
C: 
C: ....
C: c
C: .
S: 250 taken`, ".\r\n.a\r\nb.\r\n\r\n...\r\nc", []string{"x@b.test"}, "dot 250 taken"},
		{"an empty message", hello + `
C: MAIL FROM:<from@a.test>
C: RCPT TO:<x@b.test>
C: DATA
S: 250 ok
S: 250 ok
S: 354 go
C: .
S: 250 taken`, "", []string{"x@b.test"}, "dot 250 taken"},
		{"a quoted local part goes out quoted", hello + `
C: MAIL FROM:<from@a.test> SIZE=7
C: RCPT TO:<"a> NOTIFY=NEVER <b"@b.test>
C: DATA
S: 250 ok
S: 250 ok
S: 354 go
C: hello
C: .
S: 250 taken`, "hello\r\n", []string{`"a> NOTIFY=NEVER <b"@b.test`}, "dot 250 taken"},
		{"an address in UTF-8 is refused for itself alone", hello + `
C: MAIL FROM:<from@a.test> SIZE=7
C: RCPT TO:<x@b.test>
C: DATA
S: 250 ok
S: 250 ok
S: 354 go
C: hello
C: .
S: 250 taken`, "hello\r\n", []string{"ü@b.test", "x@b.test"},
			"rcpt 550 5.6.7 next hop does not take internationalized addresses\ndot 250 taken"},
		{"several lines and what is not printable", hello + `
C: MAIL FROM:<from@a.test> SIZE=7
C: RCPT TO:<x@b.test>
C: DATA
S: 250-2.1.0 one\r\n250 2.1.0 two
S: 550-5.1.1 no\tüser\r\n550 5.1.1 here
S: 554 none`, "hello\r\n", []string{"x@b.test"}, "rcpt 550 5.1.1 no\\t??ser here"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newScript(t, tt.dialog)
			got, err := testClient(t, nil).Deliver(bg(), attempt(s.addr(), tt.body, tt.to...))
			if err != nil || summary(got) != tt.want {
				t.Errorf("got %v,\n%s\nwant\n%s", err, summary(got), tt.want)
			}
			s.l.Close()
		})
	}
}

func TestEightBitMailGoesAsItIsAndIsDeclaredWhereThatIsOffered(t *testing.T) {
	const body = "Subject: \xfc\r\n\r\n\x80\xff\r\n"
	for _, tt := range []struct{ name, hello, mail string }{
		{"8BITMIME is offered", hello, "MAIL FROM:<from@a.test> SIZE=18 BODY=8BITMIME"},
		{"it is not", helloPlain, "MAIL FROM:<from@a.test>"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newScript(t, tt.hello+"C: "+tt.mail+"\nS: 250 ok\nC: RCPT TO:<x@b.test>\nS: 250 ok\nC: DATA\nS: 354 go\nC~ .\nS: 250 taken")
			a := attempt(s.addr(), body, "x@b.test")
			a.Envelope.EightBit = true
			got, err := testClient(t, nil).Deliver(bg(), a)
			if err != nil || summary(got) != "dot 250 taken" || !strings.Contains(s.bytes(1), "DATA\r\n"+body+".\r\n") {
				t.Errorf("got %s, %v; the server got %q", summary(got), err, s.bytes(1))
			}
		})
	}
}

// cutContent is a content that ends before its size, or cannot be read.
type cutContent struct{ *strings.Reader }

func (c cutContent) Size() int64 { return c.Reader.Size() + 10 }

func TestContentThatCannotBeReadIsNeverEndedByADot(t *testing.T) {
	s := newScript(t, hello+"C~ DATA\nS: 250 ok\nS: 250 ok\nS: 354 go\nhang")
	a := attempt(s.addr(), "", "x@b.test")
	a.Content = cutContent{strings.NewReader("hello\r\n")}
	got, err := testClient(t, nil).Deliver(bg(), a)
	if err != nil || summary(got) != "data 451 4.3.0 local error" || errors.Unwrap(got[0].Reply) == nil {
		t.Errorf("got %s, %v", summary(got), err)
	}
	s.stop()
	if b := s.bytes(1); hasDot(b) {
		t.Errorf("the server got %q", b)
	}
}

func TestAddressesThatNoParserMadeNeverReachTheWire(t *testing.T) {
	s := newScript(t, hello+one)
	a := attempt(s.addr(), "hello\r\n", "x@b.test")
	a.Paths = append(a.Paths, mail.Path{Local: "a\r\nRCPT TO:<evil@b.test", Domain: "b.test"}, mail.Path{})
	got, err := testClient(t, nil).Deliver(bg(), a)
	if err != nil || summary(got) != "dot 250 taken\nrcpt 553 5.1.3 bad address\nrcpt 553 5.1.3 bad address" || got[1].Reply.Cause == nil {
		t.Errorf("got %s, %v", summary(got), err)
	}
}
