package web

import (
	"encoding/json"
	"net/http"

	"mailproxy/config"
)

// Drain is the switch that takes a node out of service. Its functions may be called at once by several.
type Drain struct {
	// Begin is durable when it returns; by says who wants it. Again it changes nothing.
	Begin func(by string) error
	// End puts the node back.
	End func(by string) error
	// On says whether the node is draining now.
	On func() bool
}

// drainRequest is the body of POST and DELETE /drain.
type drainRequest struct {
	By string `json:"by"`
}

// maxBy bounds the name of who drains.
const maxBy = 100

func (s *Server) drain(w http.ResponseWriter, r *http.Request) {
	s.switchDrain(w, r, s.opts.Drain.Begin)
}

func (s *Server) undrain(w http.ResponseWriter, r *http.Request) {
	s.switchDrain(w, r, s.opts.Drain.End)
}

func (s *Server) switchDrain(w http.ResponseWriter, r *http.Request, turn func(by string) error) {
	var d drainRequest
	if err := json.NewDecoder(r.Body).Decode(&d); err != nil || d.By == "" || len(d.By) > maxBy {
		s.answer(w, http.StatusBadRequest, problem{"who wants it is missing"})
		return
	}
	if err := turn(d.By); err != nil {
		s.fail(w, err)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// masterOnly refuses a peer that is not the master.
func (s *Server) masterOnly(h http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		from := peerOf(r)
		if from == 0 || s.opts.Master() != from {
			s.opts.Log.Warn().Int("node", int(from)).Str("path", r.URL.Path).Msg("peer.refused")
			s.answer(w, http.StatusForbidden, problem{"only the master may do that"})
			return
		}
		h(w, r)
	}
}

func (s *Server) member(w http.ResponseWriter, r *http.Request) {
	if from := peerOf(r); from != 0 && s.opts.Member != nil {
		s.opts.Member(from, w, r)
		return
	}
	http.NotFound(w, r)
}

// peerOf is the CID that the tunnel has proven; 0 where the request is no peer's.
func peerOf(r *http.Request) config.CID {
	cid, _ := r.Context().Value(fromKey{}).(config.CID)
	return cid
}
