package queue

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"mime"
	"mime/multipart"
	netmail "net/mail"
	"net/textproto"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
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

// tellOne makes one DSN about one recipient, and gives it parsed.
func tellOne(t *testing.T, e *mail.Envelope, a action, n news, content string) (h netmail.Header, parts []part, spooled *mail.Envelope) {
	t.Helper()
	q := openTest(t, t.TempDir(), nil)
	id, err := q.tell("", e, a, []news{n}, strings.NewReader(content))
	if err != nil {
		t.Fatal(err)
	}
	m, err := q.spool.Open(id)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	h, parts = parseDSN(t, readAll(t, m.Content))
	return h, parts, m.Envelope
}

func TestDSNHasWhatTheSenderGave(t *testing.T) {
	e := &mail.Envelope{ReversePath: path("a@a.test"), EnvID: "QQ=+ x"}
	until := time.Date(2026, 12, 1, 0, 0, 0, 0, time.UTC)
	for _, c := range []struct {
		name   string
		action action
		reply  mail.Reply
		want   map[string]string
	}{
		{"failed", actionFailed, mail.Reply{Code: 550, Enhanced: [3]int{5, 1, 1}}, map[string]string{"Status": "5.1.1", "Will-Retry-Until": ""}},
		{"delayed", actionDelayed, mail.Reply{Code: 451}, map[string]string{"Status": "4.0.0", "Will-Retry-Until": "Tue, 01 Dec 2026 00:00:00 +0000"}},
		{"relayed", actionRelayed, mail.Reply{Code: 250}, map[string]string{"Status": "2.0.0", "Will-Retry-Until": ""}},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := news{path: path("x@b.test"), params: mail.RcptParams{Original: "rfc822;old+x@b.test"}, until: until}
			n.outcome = *outcomeOf(relay.Result{Reply: &c.reply, Hop: "mx.b.test:25"}, time.Now())
			_, parts, _ := tellOne(t, e, c.action, n, "Subject: x\r\n\r\nbody\r\n")
			f := fieldsOf(t, parts[1].body)
			if f[0].Get("Original-Envelope-Id") != "QQ=+ x" || f[1].Get("Original-Recipient") != "rfc822; old+x@b.test" || f[1].Get("Action") != c.name {
				t.Errorf("fields %+v", f)
			}
			for field, want := range c.want {
				if got := f[1].Get(field); got != want {
					t.Errorf("%s: %q, want %q", field, got, want)
				}
			}
		})
	}
}

func TestDSNReturnsWhatIsWanted(t *testing.T) {
	const message = "Subject: x\r\n\r\n--inner\r\n.dot\r\nend\r\n"
	for _, c := range []struct {
		name    string
		e       mail.Envelope
		action  action
		content string
		want    string // type of the third part
		eight   bool
	}{
		{"nothing said: the header", mail.Envelope{}, actionFailed, message, "text/rfc822-headers", false},
		{"RET=HDRS", mail.Envelope{Return: mail.ReturnHeader}, actionFailed, message, "text/rfc822-headers", false},
		{"RET=FULL", mail.Envelope{Return: mail.ReturnFull}, actionFailed, message, "message/rfc822", false},
		{"RET is about failure only", mail.Envelope{Return: mail.ReturnFull}, actionDelayed, message, "text/rfc822-headers", false},
		{"without a line end behind it", mail.Envelope{Return: mail.ReturnFull}, actionFailed, "Subject: x\r\n\r\nend", "message/rfc822", false},
		{"8-bit", mail.Envelope{Return: mail.ReturnFull}, actionFailed, message + "\xfc\r\n", "message/rfc822", true},
		{"a UTF-8 header", mail.Envelope{Return: mail.ReturnFull, SMTPUTF8: true}, actionFailed, "Subject: ü\r\n\r\nx\r\n", "message/global", true},
		{"a UTF-8 header, of it alone", mail.Envelope{SMTPUTF8: true}, actionFailed, "Subject: ü\r\n\r\nx\r\n", "message/global-headers", false},
		{"too large", mail.Envelope{Return: mail.ReturnFull}, actionFailed, message + strings.Repeat("x\r\n", maxReturned/3), "text/rfc822-headers", false},
		{"just not too large", mail.Envelope{Return: mail.ReturnFull}, actionFailed, message + strings.Repeat("x", 900) + "\r\n" +
			strings.Repeat("1234567890123456789012345678901234567890123456789012345678901\r\n", (maxReturned-len(message)-902)/63), "message/rfc822", false},
		{"a line that is too long", mail.Envelope{Return: mail.ReturnFull}, actionFailed, message + strings.Repeat("x", 999), "text/rfc822-headers", false},
		{"NUL", mail.Envelope{Return: mail.ReturnFull}, actionFailed, message + "\x00\r\n", "text/rfc822-headers", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.e.ReversePath = path("a@a.test")
			n := news{path: path("x@b.test"), outcome: outcome{Code: 550}}
			_, parts, spooled := tellOne(t, &c.e, c.action, n, c.content)
			if got := parts[2].header.Get("Content-Type"); got != c.want || spooled.EightBit != c.eight || spooled.SMTPUTF8 {
				t.Errorf("%s, %+v", got, spooled)
			}
			want, _, _ := strings.Cut(c.content, "\r\n\r\n")
			if c.want == "message/rfc822" || c.want == "message/global" {
				want = c.content
			}
			if got := strings.TrimRight(parts[2].body, "\r\n"); got != strings.TrimRight(want, "\r\n") {
				t.Errorf("got %.200q\nwant %.200q", got, want)
			}
		})
	}
}

// A message that would end its own part does not come back whole.
func TestDSNDoesNotReturnWhatHasItsBoundary(t *testing.T) {
	d := &dsn{id: "X", envelope: &mail.Envelope{}, whole: []byte("a\r\n--=_X--\r\n")}
	if d.mayReturn() {
		t.Error("it would end the part")
	}
}

// For a reverse-path in ASCII the DSN needs no SMTPUTF8: it has UTF-8 addresses in their ASCII form (RFC 6533 §3).
func TestDSNInASCIIOfAUTF8Recipient(t *testing.T) {
	e := &mail.Envelope{ReversePath: path("a@a.test"), SMTPUTF8: true}
	n := news{path: path("ü@b.test"), params: mail.RcptParams{Original: "utf-8;ö+@b.test"}, outcome: outcome{Code: 550}}
	_, parts, spooled := tellOne(t, e, actionFailed, n, "Subject: x\r\n\r\n")
	f := fieldsOf(t, parts[1].body)[1]
	if spooled.SMTPUTF8 || f.Get("Final-Recipient") != `utf-8; \x{FC}@b.test` || f.Get("Original-Recipient") != `utf-8; \x{F6}\x{2B}@b.test` ||
		parts[1].header.Get("Content-Type") != "message/delivery-status" || !strings.Contains(parts[0].body, "<ü@b.test>") {
		t.Errorf("%+v %+v %q", spooled, f, parts[0])
	}
}

func TestDSNsAreBounded(t *testing.T) {
	inBubble(t, func(t *testing.T, q *testQueue) {
		var mu sync.Mutex
		var told int
		attempts := map[string]int{}
		q.hop.set(func(a relay.Attempt) ([]relay.Result, error) {
			mu.Lock()
			defer mu.Unlock()
			if a.Envelope.ReversePath.IsNull() {
				told++
			} else {
				attempts[a.Paths[0].String()]++
			}
			return answers(a)
		})
		for i := range limitPerPath + 5 {
			q.mustPut(t, false, draft("victim@a.test", fmt.Sprintf("no%d@b.test", i)))
		}
		q.mustPut(t, false, draft("other@a.test", "no@b.test"))
		time.Sleep(limitWindow - time.Minute)
		synctest.Wait()
		if told != limitPerPath+1 || len(q.List()) != 5 {
			t.Errorf("told %d times, %d items wait", told, len(q.List()))
		}
		time.Sleep(2 * limitWindow)
		synctest.Wait()
		if told != limitPerPath+6 || len(q.List()) != 0 {
			t.Errorf("in the next hour: told %d times, %d items wait", told, len(q.List()))
		}
		for to, n := range attempts {
			if n != 1 {
				t.Errorf("%s was tried %d times", to, n)
			}
		}
	})
}

// Who waits for the DSN's turn still does after a restart, and is not tried meanwhile; in the end nobody is told, and the log says so.
func TestWhatIsNotYetToldWaitsOnDisk(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		tried, start := 0, time.Now()
		for day := 0; day < 8; day += 4 {
			q := openTest(t, dir, nil)
			if n := q.Stats().Kept; n != 0 {
				t.Errorf("%d are kept that are only told later", n)
			}
			q.limit.byPath = map[mail.Path]int{}
			q.limit.all = limitAll
			q.o.Now = func() time.Time { // an hour that does not end
				q.limit.mu.Lock()
				defer q.limit.mu.Unlock()
				q.limit.since = time.Now()
				return q.limit.since
			}
			q.hop.set(func(a relay.Attempt) ([]relay.Result, error) { tried++; return answers(a) })
			if day == 0 {
				q.mustPut(t, false, draft("from@a.test", "no@b.test"))
			}
			ctx, cancel := context.WithCancel(t.Context())
			var wg sync.WaitGroup
			wg.Go(func() { _ = q.Run(ctx) })
			time.Sleep(4 * 24 * time.Hour)
			cancel()
			wg.Wait()
			waits := time.Since(start) < defaultLife+limitPatience
			if l := q.List(); tried != 1 || (len(l) == 1) != waits || (q.Stats().Untold == 0) != waits {
				t.Errorf("after %v: tried %d times, %+v, queue %+v", time.Since(start), tried, q.Stats(), l)
			}
			q.Close()
		}
	})
}

// In the client's transaction what cannot be told now is queued: it is told later.
func TestDSNInATransactionWaitsInTheQueue(t *testing.T) {
	q := openTest(t, t.TempDir(), nil)
	_ = q.limit.take(path("a@a.test"), time.Now())
	q.limit.all = limitAll
	e := &mail.Envelope{ReversePath: path("a@a.test"), ForwardPaths: paths("ok@b.test", "no@b.test"), ReceivedAt: time.Now()}
	ids, err := q.DSN(context.Background(), e, []relay.Result{
		{Path: path("ok@b.test"), Reply: &mail.Reply{Code: 250}}, {Path: path("no@b.test"), Reply: &mail.Reply{Code: 550}},
	}, strings.NewReader(body))
	if err != nil || len(ids) != 1 {
		t.Fatal(ids, err)
	}
	if l := q.List(); len(l) != 1 || l[0].ReversePath != e.ReversePath || len(l[0].ForwardPaths) != 1 || l[0].ForwardPaths[0] != path("no@b.test") {
		t.Errorf("queue: %+v", l)
	}
}

func TestTheLimitForgetsByTheHourAndIsBounded(t *testing.T) {
	var l dsnLimit
	now := time.Now()
	for i := range limitAll + 10 {
		if err := l.take(path(fmt.Sprintf("x%d@a.test", i)), now); (err != nil) != (i >= limitAll) {
			t.Fatalf("%d: %v", i, err)
		}
	}
	if len(l.byPath) > limitAll {
		t.Errorf("%d remembered", len(l.byPath))
	}
	if err := l.take(path("x@a.test"), now.Add(limitWindow)); err != nil || len(l.byPath) != 1 {
		t.Error(err, len(l.byPath))
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
