package web

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"mailproxy/config"
	"mailproxy/mail"
	"mailproxy/queue"
)

// Bounds of what goes on for long: each part of it has so long.
const (
	streamStep   = time.Minute
	maxItemBytes = 5 << 30 // an item on its way here, with its envelope
	maxItemHead  = 16 << 20
	maxWho       = 100
	peerPatience = 2 * time.Second
)

// queueRoutes are what a node's administrator may see of the queue and do with it. Whoever is root on a member may do so on all.
func (s *Server) queueRoutes(mux *http.ServeMux) {
	mux.HandleFunc("GET /queue", s.queueList)
	mux.HandleFunc("GET /queue/summary", s.queueSummary)
	mux.HandleFunc("GET /queue/{id}", s.queueShow)
	mux.HandleFunc("GET /queue/{id}/content", s.queueContent)
	mux.HandleFunc("POST /queue/order", s.queueOrder)
}

// A QueueLine is one line of the answers of GET /queue and POST /queue/order. Where the last one has neither End nor Error the rest was lost.
type QueueLine struct {
	// Item is one that is listed.
	Item *queue.Item `json:"item,omitempty"`
	// Done is what became of one item of an order.
	Done *Ordered `json:"done,omitempty"`
	// End is the last line: of a list how many there are, of an order nothing more.
	End *queue.Counted `json:"end,omitempty"`
	// Error is why it ends before its end.
	Error string `json:"error,omitempty"`
}

// Ordered is what became of an order for one item.
type Ordered struct {
	ID string `json:"id"`
	// Error is why it was not done.
	Error string `json:"error,omitempty"`
}

// selectionOf reads a selection from a query.
func selectionOf(query url.Values) (queue.Selection, error) {
	sel := queue.Selection{IDs: query["id"], From: query.Get("from"), To: query.Get("to"), Reason: query.Get("reason"), OnHold: query.Get("on_hold") != "", Kept: query.Get("kept") != ""}
	if text := query.Get("older"); text != "" {
		var err error
		if sel.Older, err = time.ParseDuration(text); err != nil {
			return sel, fmt.Errorf("%w: older: %w", queue.ErrSelection, err)
		}
	}
	return sel, sel.Check()
}

// queryOf is the other side of selectionOf.
func queryOf(sel queue.Selection) url.Values {
	query := url.Values{"id": sel.IDs}
	for key, value := range map[string]string{"from": sel.From, "to": sel.To, "reason": sel.Reason} {
		if value != "" {
			query.Set(key, value)
		}
	}
	if sel.Older != 0 {
		query.Set("older", sel.Older.String())
	}
	if sel.OnHold {
		query.Set("on_hold", "1")
	}
	if sel.Kept {
		query.Set("kept", "1")
	}
	return query
}

// queueList streams items; limit is how many, below 0 all.
func (s *Server) queueList(w http.ResponseWriter, r *http.Request) {
	sel, err := selectionOf(r.URL.Query())
	limit := -1
	if text := r.URL.Query().Get("limit"); err == nil && text != "" {
		if limit, err = strconv.Atoi(text); err != nil {
			err = fmt.Errorf("%w: limit: %w", queue.ErrSelection, err)
		}
	}
	if err != nil {
		s.fail(w, err)
		return
	}
	out := newLines(w)
	counted, err := s.opts.Queue.Each(sel, limit, func(i queue.Item) error { return out.line(QueueLine{Item: &i}) })
	out.end(counted, err)
}

func (s *Server) queueSummary(w http.ResponseWriter, r *http.Request) {
	sel, err := selectionOf(r.URL.Query())
	if err != nil {
		s.fail(w, err)
		return
	}
	summary, err := s.opts.Queue.Summary(sel)
	if err != nil {
		s.fail(w, err)
		return
	}
	s.answer(w, http.StatusOK, summary)
}

func (s *Server) queueShow(w http.ResponseWriter, r *http.Request) {
	story, err := s.opts.Queue.Story(r.PathValue("id"))
	if err != nil {
		s.fail(w, err)
		return
	}
	s.answer(w, http.StatusOK, story)
}

// queueContent gives a message as it is sent.
func (s *Server) queueContent(w http.ResponseWriter, r *http.Request) {
	started := false
	err := s.opts.Queue.Message(r.PathValue("id"), func(c mail.Content) error {
		started = true
		h := w.Header()
		h.Set("Content-Type", "application/octet-stream") // whatever it is, nothing is to run it
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Cache-Control", "no-store")
		h.Set("Content-Length", strconv.FormatInt(c.Size(), 10))
		_, err := io.Copy(patientWriter{w}, io.NewSectionReader(c, 0, c.Size()))
		return err
	})
	if err != nil && !started {
		s.fail(w, err)
	}
}

// queueOrder carries out an administrator's order, here or typed at another member, and streams what becomes of each item.
func (s *Server) queueOrder(w http.ResponseWriter, r *http.Request) {
	var o queue.Order
	if err := json.NewDecoder(r.Body).Decode(&o); err != nil || o.Who == "" || len(o.Who) > maxWho {
		s.answer(w, http.StatusBadRequest, problem{"unreadable order"})
		return
	}
	o.Node = peerOf(r)
	if err := s.opts.Queue.CanDo(o); err != nil {
		s.fail(w, err)
		return
	}
	out := newLines(w)
	said := func(id string, err error) error {
		line := Ordered{ID: id}
		if err != nil {
			line.Error = err.Error()
		}
		return out.line(QueueLine{Done: &line})
	}
	if o.Deed != queue.Move {
		out.end(queue.Counted{}, s.opts.Queue.Do(r.Context(), o, said))
		return
	}
	there, err := s.receiver(r.Context(), o.To)
	if err == nil {
		err = s.opts.Queue.Move(r.Context(), o, there.give, said)
	}
	out.end(queue.Counted{}, err)
}

// receiver gives the way to a member that items are to be given to, once that has answered.
func (s *Server) receiver(ctx context.Context, to config.CID) (*Client, error) {
	socket, ok := "", false
	if s.opts.Peer != nil {
		socket, ok = s.opts.Peer(to)
	}
	if !ok {
		return nil, fmt.Errorf("node %d is no other node of this cluster", to)
	}
	c := Peer(socket)
	if _, err := c.Health(ctx); err != nil {
		return nil, fmt.Errorf("node %d does not answer: %w", to, err)
	}
	return c, nil
}

// queueReceive takes an item that another member moves here: a line of JSON, and the content.
func (s *Server) queueReceive(w http.ResponseWriter, r *http.Request) {
	body := bufio.NewReaderSize(&patientReader{http.NewResponseController(w), r.Body}, 64<<10)
	m, err := readMoved(body)
	if err == nil && m.ID != r.PathValue("id") {
		err = errors.New("another item's ID")
	}
	if err != nil {
		s.answer(w, http.StatusBadRequest, problem{"unreadable item: " + err.Error()})
		return
	}
	if err := s.opts.Queue.Receive(peerOf(r), m, body); err != nil {
		var reply *mail.Reply
		if errors.As(err, &reply) { // it is for the administrator: the cause says more
			err = fmt.Errorf("%w: %w", reply, reply.Cause)
		}
		s.opts.Log.Warn().Str("item", m.ID).Int("node", int(peerOf(r))).Err(err).Msg("item.refused")
		code := http.StatusConflict
		if errors.Is(err, queue.ErrComing) {
			code = http.StatusLocked
		}
		s.answer(w, code, problem{err.Error()})
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

func readMoved(r *bufio.Reader) (*queue.Moved, error) {
	var line []byte
	for {
		part, err := r.ReadSlice('\n')
		line = append(line, part...)
		switch {
		case len(line) > maxItemHead:
			return nil, errors.New("too long")
		case err == nil:
			m := new(queue.Moved)
			return m, json.Unmarshal(line, m)
		case !errors.Is(err, bufio.ErrBufferFull):
			return nil, err
		}
	}
}

// lines is an answer of one JSON object a line, as long as somebody reads it.
type lines struct {
	b   *bufio.Writer
	enc *json.Encoder
}

func newLines(w http.ResponseWriter) *lines {
	w.Header().Set("Content-Type", "application/x-ndjson")
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(http.StatusOK)
	rc := http.NewResponseController(w)
	_ = rc.SetReadDeadline(time.Time{}) // one that passes meanwhile would end the request; each write has its own time
	_ = rc.Flush()                      // now, not with the first line: we are alive
	l := &lines{b: bufio.NewWriterSize(patientWriter{w}, 32<<10)}
	l.enc = json.NewEncoder(l.b)
	return l
}

func (l *lines) line(v QueueLine) error { return l.enc.Encode(v) }

func (l *lines) end(c queue.Counted, err error) {
	last := QueueLine{End: &c}
	if err != nil {
		last = QueueLine{Error: err.Error()}
	}
	_ = l.line(last) // whoever asked may be gone
	_ = l.b.Flush()  // as above
}

// patientWriter gives each write its time.
type patientWriter struct{ w http.ResponseWriter }

func (p patientWriter) Write(b []byte) (int, error) {
	if err := http.NewResponseController(p.w).SetWriteDeadline(time.Now().Add(streamStep)); err != nil {
		return 0, err
	}
	return p.w.Write(b)
}

// patientReader gives each read its time.
type patientReader struct {
	rc *http.ResponseController
	r  io.Reader
}

func (p *patientReader) Read(b []byte) (int, error) {
	now := time.Now()
	// Both: the answer comes behind the last octet.
	if err := errors.Join(p.rc.SetReadDeadline(now.Add(streamStep)), p.rc.SetWriteDeadline(now.Add(2*streamStep))); err != nil {
		return 0, err
	}
	return p.r.Read(b)
}

// Queue asks for the items that are meant, at most limit (below 0: all), and calls each for every one, the oldest first.
func (c *Client) Queue(ctx context.Context, sel queue.Selection, limit int, each func(queue.Item) error) (queue.Counted, error) {
	query := queryOf(sel)
	query.Set("limit", strconv.Itoa(limit))
	return c.lines(ctx, http.MethodGet, "/queue?"+query.Encode(), nil, func(l QueueLine) error {
		if l.Item == nil {
			return nil
		}
		return each(*l.Item)
	})
}

// QueueSummary asks for the queue by next hop.
func (c *Client) QueueSummary(ctx context.Context, sel queue.Selection) (queue.Summary, error) {
	var s queue.Summary
	return s, c.do(ctx, http.MethodGet, "/queue/summary?"+queryOf(sel).Encode(), &s)
}

// Item asks for one item; ErrNoSuch where there is none.
func (c *Client) Item(ctx context.Context, id string) (queue.Story, error) {
	var i queue.Story
	return i, c.do(ctx, http.MethodGet, "/queue/"+url.PathEscape(id), &i)
}

// Content copies an item's message to w; ErrNoSuch where there is none.
func (c *Client) Content(ctx context.Context, id string, w io.Writer) error {
	resp, err := c.send(ctx, c.stream, http.MethodGet, "/queue/"+url.PathEscape(id)+"/content", nil)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	_, err = io.Copy(w, resp.Body)
	return err
}

// Order has an order carried out and calls each for every item that was meant.
func (c *Client) Order(ctx context.Context, o queue.Order, each func(Ordered) error) error {
	body, err := json.Marshal(o)
	if err != nil {
		return err
	}
	_, err = c.lines(ctx, http.MethodPost, "/queue/order", strings.NewReader(string(body)), func(l QueueLine) error {
		if l.Done == nil {
			return nil
		}
		return each(*l.Done)
	})
	return err
}

// lines reads an answer of QueueLines to its end.
func (c *Client) lines(ctx context.Context, method, path string, body io.Reader, each func(QueueLine) error) (queue.Counted, error) {
	resp, err := c.send(ctx, c.stream, method, path, body)
	if err != nil {
		return queue.Counted{}, err
	}
	defer func() { _ = resp.Body.Close() }()
	d := json.NewDecoder(resp.Body)
	for {
		var l QueueLine
		if err := d.Decode(&l); err != nil {
			return queue.Counted{}, fmt.Errorf("%w: %w", ErrCut, err)
		}
		switch {
		case l.Error != "":
			return queue.Counted{}, errors.New(l.Error)
		case l.End != nil:
			return *l.End, nil
		}
		if err := each(l); err != nil {
			return queue.Counted{}, err
		}
	}
}

// give gives an item to the daemon behind c, durably. The error wraps queue.ErrRefused where it is not there, and is queue.ErrComing where
// it is on its way there already.
func (c *Client) give(ctx context.Context, m *queue.Moved, content mail.Content) error {
	head, err := json.Marshal(m)
	if err != nil {
		return fmt.Errorf("%w: %w", queue.ErrRefused, err)
	}
	head = append(head, '\n')
	body := io.MultiReader(strings.NewReader(string(head)), io.NewSectionReader(content, 0, content.Size()))
	r, err := http.NewRequestWithContext(ctx, http.MethodPut, "http://daemon/queue/"+m.ID, io.NopCloser(body))
	if err != nil {
		return fmt.Errorf("%w: %w", queue.ErrRefused, err)
	}
	r.ContentLength = int64(len(head)) + content.Size()
	resp, err := c.gives.Do(r)
	var dial *net.OpError
	if errors.As(err, &dial) && dial.Op == "dial" {
		return fmt.Errorf("%w: %w", queue.ErrRefused, err)
	}
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode == http.StatusNoContent {
		return nil
	}
	if resp.StatusCode == http.StatusLocked {
		return queue.ErrComing
	}
	if resp.StatusCode/100 == 4 || resp.StatusCode == http.StatusBadGateway { // the tunnel's own word
		return fmt.Errorf("%w: %w", queue.ErrRefused, problemOf(resp))
	}
	return problemOf(resp)
}
