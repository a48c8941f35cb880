package queue

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"mime"
	"mime/multipart"
	netmail "net/mail"
	"net/textproto"
	"strings"
	"testing"
	"time"

	"mailproxy/mail"
	"mailproxy/relay"
)

func readAll(t testing.TB, c mail.Content) string {
	t.Helper()
	b, err := io.ReadAll(io.NewSectionReader(c, 0, c.Size()))
	if err != nil {
		t.Error(err)
	}
	return string(b)
}

type part struct {
	header textproto.MIMEHeader
	body   string
}

// parseDSN reads a DSN with the standard library, and checks what holds for every one.
func parseDSN(t *testing.T, raw string) (netmail.Header, []part) {
	t.Helper()
	if strings.Contains(strings.ReplaceAll(raw, "\r\n", ""), "\n") || strings.Contains(strings.ReplaceAll(raw, "\r\n", ""), "\r") {
		t.Error("bare CR or LF")
	}
	for line := range strings.SplitSeq(raw, "\r\n") {
		if len(line) > 998 {
			t.Errorf("line of %d octets", len(line))
		}
	}
	m, err := netmail.ReadMessage(strings.NewReader(raw))
	if err != nil {
		t.Fatal(err)
	}
	kind, params, err := mime.ParseMediaType(m.Header.Get("Content-Type"))
	if err != nil || kind != "multipart/report" || params["report-type"] != "delivery-status" {
		t.Fatalf("%s %v %v", kind, params, err)
	}
	var parts []part
	r := multipart.NewReader(m.Body, params["boundary"])
	for {
		p, err := r.NextPart() // decodes quoted-printable
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(p)
		if err != nil {
			t.Fatal(err)
		}
		parts = append(parts, part{p.Header, string(b)})
	}
	if len(parts) != 3 {
		t.Fatalf("%d parts", len(parts))
	}
	return m.Header, parts
}

// fieldsOf gives the blocks of a delivery-status part.
func fieldsOf(t *testing.T, body string) (out []textproto.MIMEHeader) {
	t.Helper()
	r := textproto.NewReader(bufio.NewReader(strings.NewReader(body)))
	for {
		h, err := r.ReadMIMEHeader()
		if len(h) > 0 {
			out = append(out, h)
		}
		if err == io.EOF {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func TestDSN(t *testing.T) {
	q := openTest(t, t.TempDir(), nil)
	content := "Subject: hello\r\nX-Long: " + strings.Repeat("y", 2000) + "\r\nX-8: \xfc\r\n--=_x\r\n\r\nsecret body\r\n"
	e := &mail.Envelope{ReversePath: path(`"a b"@a.test`), ReceivedAt: time.Now()}
	ids, err := q.DSN(context.Background(), e, []relay.Result{
		{Path: path("ok@b.test"), Reply: &mail.Reply{Code: 250}},
		{Path: path("no@b.test"), Hop: "mx.b.test:25", Reply: &mail.Reply{Code: 550, Enhanced: [3]int{5, 1, 1}, Text: "no\nsuch user"}},
		{Path: path("bare@b.test"), Reply: &mail.Reply{Code: 554, Text: strings.Repeat("long ", 600)}},
		{Path: path("ours@b.test"), Hop: "mx.b.test:25", Reply: &mail.Reply{Code: 553, Text: "bad address", Cause: errors.New("made here")}},
	}, strings.NewReader(content))
	if err != nil {
		t.Fatal(err)
	}
	id := ids[0]
	item, _, err := q.Show(id)
	if err != nil || !item.ReversePath.IsNull() || len(item.ForwardPaths) != 1 || item.ForwardPaths[0] != e.ReversePath {
		t.Fatalf("item %+v, %v", item, err)
	}
	m, err := q.spool.Open(id)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	raw := readAll(t, m.Content)
	if strings.IndexFunc(raw, func(r rune) bool { return r >= 0x80 }) >= 0 || strings.Contains(raw, "secret body") {
		t.Errorf("8-bit, or more than the header:\n%s", raw)
	}
	h, parts := parseDSN(t, raw)
	to, err := netmail.ParseAddress(h.Get("To"))
	if err != nil || to.Address != "a b@a.test" || h.Get("Auto-Submitted") != "auto-replied" || h.Get("Message-Id") == "" {
		t.Errorf("header %v, %v", h, err)
	}
	if _, err := h.Date(); err != nil {
		t.Error(err)
	}
	if !strings.Contains(parts[0].body, "<no@b.test>:\r\n    host mx.b.test:25 said: 550 5.1.1 no such user") ||
		!strings.Contains(parts[0].body, "<ours@b.test>:\r\n    not passed on to host mx.b.test:25: 553 bad address") {
		t.Errorf("text:\n%s", parts[0].body)
	}
	if ct := parts[1].header.Get("Content-Type"); ct != "message/delivery-status" {
		t.Error(ct)
	}
	f := fieldsOf(t, parts[1].body)
	if len(f) != 4 || f[0].Get("Reporting-Mta") != "dns; mx.test" || f[1].Get("Final-Recipient") != "rfc822; no@b.test" ||
		f[1].Get("Action") != "failed" || f[1].Get("Status") != "5.1.1" || f[1].Get("Remote-Mta") != "dns; mx.b.test" ||
		f[1].Get("Diagnostic-Code") != "smtp; 550 5.1.1 no such user" || f[2].Get("Status") != "5.0.0" {
		t.Errorf("status %+v", f)
	}
	for _, unsaid := range f[2:] { // no hop was asked, or it did not say so
		if unsaid.Get("Remote-Mta")+unsaid.Get("Diagnostic-Code") != "" {
			t.Errorf("status %+v", unsaid)
		}
	}
	if ct := parts[2].header.Get("Content-Type"); ct != "text/rfc822-headers" {
		t.Error(ct)
	}
	if want, _, _ := strings.Cut(content, "\r\n\r\n"); strings.TrimRight(parts[2].body, "\r\n") != want {
		t.Errorf("header came as %q", parts[2].body)
	}
}

func TestDSNWithUTF8Addresses(t *testing.T) {
	q := openTest(t, t.TempDir(), nil)
	e := &mail.Envelope{ReversePath: path("ä@a.test"), SMTPUTF8: true}
	ids, err := q.DSN(context.Background(), e, []relay.Result{{Path: path("ü@b.test"), Reply: &mail.Reply{Code: 550}}},
		strings.NewReader("Subject: ö\r\n\r\nx\r\n"))
	if err != nil {
		t.Fatal(err)
	}
	m, err := q.spool.Open(ids[0])
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if !m.Envelope.SMTPUTF8 {
		t.Error("spooled without SMTPUTF8")
	}
	_, parts := parseDSN(t, readAll(t, m.Content))
	if ct := parts[1].header.Get("Content-Type"); ct != "message/global-delivery-status" ||
		fieldsOf(t, parts[1].body)[1].Get("Final-Recipient") != "utf-8; ü@b.test" ||
		parts[2].header.Get("Content-Type") != "message/global-headers" || strings.TrimSpace(parts[2].body) != "Subject: ö" {
		t.Errorf("parts %+v", parts)
	}
}

func TestDSNKeepsAHeaderLineThatLooksLikeItsBoundary(t *testing.T) {
	header := "Subject: a\r\n--=_X--\r\nX-Last: b\r\n"
	for _, utf8 := range []bool{false, true} {
		d := &dsn{id: "X", hostname: "mx.test", envelope: &mail.Envelope{ReversePath: path("a@a.test")}, header: []byte(header), utf8: utf8}
		raw := strings.ReplaceAll(string(d.bytes()), "global-delivery-status", "delivery-status")
		if _, parts := parseDSN(t, raw); strings.TrimRight(parts[2].body, "\r\n")+"\r\n" != header {
			t.Errorf("header came as %q", parts[2].body)
		}
	}
}

func TestLifeText(t *testing.T) {
	for life, want := range map[time.Duration]string{
		5 * 24 * time.Hour: "5 days", 24 * time.Hour: "1 day", 36 * time.Hour: "1 day 12 hours", 90 * time.Minute: "1 hour 30 minutes",
		time.Minute: "1 minute", 61 * time.Second: "1 minute 1 second",
	} {
		if got := lifeText(life); got != want {
			t.Errorf("%v: %q, want %q", life, got, want)
		}
	}
}

// The room that MinFree keeps is there for what ends mail that was accepted.
func TestDSNsAreSpooledIntoTheRoomThatIsKeptFree(t *testing.T) {
	q := openTest(t, t.TempDir(), nil)
	q.mustPut(t, false, draft("from@a.test", "no@b.test"))
	q.o.MinFree = 1 << 62
	if _, err := q.Put(context.Background(), []Draft{draft("from@a.test", "x@b.test")}, false); !errors.Is(err, ErrFull) {
		t.Fatalf("new mail: %v", err)
	}
	q.run(t)
	waitFor(t, "the queue is empty", func() bool { return len(q.List()) == 0 })
	if s := q.Stats(); s.DSNs != 1 || s.Failed != 1 || s.Sent != 1 {
		t.Errorf("stats %+v", s)
	}
}

func TestNoDSNForANullReversePathOrWithoutAFailure(t *testing.T) {
	q := openTest(t, t.TempDir(), nil)
	no := []relay.Result{{Path: path("no@b.test"), Reply: &mail.Reply{Code: 550}}}
	if ids, err := q.DSN(context.Background(), &mail.Envelope{}, no, strings.NewReader(body)); ids != nil || err != nil {
		t.Errorf("null reverse-path: %q, %v", ids, err)
	}
	ok := []relay.Result{{Path: path("ok@b.test"), Reply: &mail.Reply{Code: 250}}}
	e := &mail.Envelope{ReversePath: path("a@a.test")}
	if ids, err := q.DSN(context.Background(), e, ok, strings.NewReader(body)); ids != nil || err != nil {
		t.Errorf("no failure: %q, %v", ids, err)
	}
	if len(q.List()) != 0 {
		t.Errorf("items %v", q.List())
	}
}

func TestHeaderShown(t *testing.T) {
	for in, want := range map[string]string{
		"": "", "\r\nbody": "", "A: b\r\n\r\nbody": "A: b\r\n", "A: b\r\n": "A: b\r\n", "A: b": "A: b",
	} {
		if got, err := readHeader(strings.NewReader(in)); err != nil || string(got) != want {
			t.Errorf("%q: got %q, %v", in, got, err)
		}
	}
	if got, err := readHeader(bytes.NewReader(make([]byte, 1<<20))); err != nil || len(got) != maxShownHeader {
		t.Errorf("got %d octets, %v", len(got), err)
	}
}
